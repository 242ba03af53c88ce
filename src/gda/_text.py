"""Text that is at hand everywhere. A leaf module: it imports nothing of the project."""


def python_documentation() -> str:
    """English text that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
