"""Code that all other packages of `gda` use. It imports none of them."""
