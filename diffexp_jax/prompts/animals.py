"""The animals: the 45 of DDPO and DiffExp, and the six that AlignProp keeps for its unseen-prompt test.

Sources: `simple_animals.txt` of ddpo-pytorch and of AlignProp, each in its file's order (a prompt's id is its index).
"""

SEEN = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep"),
    *("deer", "cow", "goat", "lion", "tiger", "bear", "raccoon", "fox", "wolf"),
    *("lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel"),
    *("mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee"),
    *("pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)

UNSEEN = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")


def with_article(noun: str) -> str:
    """ "dog" -> "a dog", "ant" -> "an ant"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
