"""Random words and sentences: names, prose without content, and words without meaning."""

from random import Random


def words_of(text: str) -> tuple[str, ...]:
    """The words of a string: a compact way to write long lists."""
    return tuple(text.split())


CITIES = words_of(
    "Accra Adelaide Amman Athens Baku Bangkok Bergen Bogota Boston Brisbane Brussels Cairo Calgary Chicago Cork Dakar "
    "Delhi Denver Dublin Durban Geneva Glasgow Hanoi Havana Helsinki Houston Istanbul Jakarta Kigali Kyoto Lagos Leeds "
    "Lima Lisbon London Lusaka Lyon Madrid Malaga Manila Marseille Milan Montreal Moscow Mumbai Munich Nairobi Naples "
    "Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul Seville Sydney Tokyo Toronto "
    "Tunis Turin Venice Vienna Warsaw"
)

_WHO = words_of(
    "baker carpenter child cook dancer doctor driver farmer fisherman gardener guide judge librarian miller musician "
    "neighbour nurse painter poet potter sailor shepherd singer student tailor teacher traveller visitor weaver writer"
)
_HOW = words_of("busy careful cheerful clever eager friendly gentle honest old patient proud quiet tall tired young")
_DID = words_of(
    "admired borrowed bought carried cleaned described drew forgot found hid kept liked lost mended moved needed "
    "noticed offered opened packed remembered repaired showed sold studied watched"
)
_WHAT = words_of(
    "basket bell blanket book bottle box bridge candle carpet chair clock coat cup curtain door drum fence flag garden "
    "hammer ladder lamp letter map mirror needle picture pot ring rope shelf spoon stone table wheel window"
)
_KIND = words_of("blue broken brown clean dark grey green heavy large light narrow new plain red small white wooden")
_WHERE = (
    "at the market",
    "at the old mill",
    "behind the church",
    "beside the river",
    "by the lake",
    "during the summer",
    "in the early morning",
    "in the kitchen",
    "in the little village",
    "near the forest",
    "near the harbour",
    "on a rainy day",
    "on the hill",
    "on the way home",
    "under the bridge",
    "with great care",
)
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def sentence(random: Random) -> str:
    """A sentence without names or numbers, such as "The old baker mended a red lamp near the harbour."."""
    who, what = f"{random.choice(_HOW)} {random.choice(_WHO)}", f"{random.choice(_KIND)} {random.choice(_WHAT)}"
    where = random.choice(_WHERE)
    if random.random() < 0.5:
        return f"The {who} {random.choice(_DID)} the {what} {where}."
    return f"{where.capitalize()}, the {who} {random.choice(_DID)} a {what}."


def made_up_words(random: Random, number: int) -> list[str]:
    """`number` different words without meaning, such as "bako", or "bakote" if there are not enough short ones."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    length = 2
    while len(syllables) ** length < 4 * number:  # enough words that a random one is soon a new one
        length += 1
    words: dict[str, None] = {}
    while len(words) < number:
        words["".join(random.choices(syllables, k=length))] = None
    return list(words)
