"""What the emoji world contains: animals, activities, the object of each activity, and their Unicode code points.

The order is fixed: a shipped sprite, scene or caption is found by its index here. Activity k (from 1; 0 is "none")
is shown by object k.
"""

from diffexp_jax.prompts import activities, animals

ANIMALS = animals.SEEN + animals.UNSEEN  # 51
ACTIVITIES = activities.SEEN + activities.UNSEEN  # 6
OBJECTS = ("plate", "bicycle", "pawn", "basket", "car", "football")  # one per activity, in the same order
STYLES = ("noto", "fluent")

# File names of the two emoji sets: code points in hexadecimal. A set may leave out the variation selector -fe0f.
CODEPOINTS = {
    "cat": "1f408",
    "dog": "1f415",
    "horse": "1f40e",
    "monkey": "1f412",
    "rabbit": "1f407",
    "zebra": "1f993",
    "spider": "1f577-fe0f",
    "bird": "1f426",
    "sheep": "1f411",
    "deer": "1f98c",
    "cow": "1f404",
    "goat": "1f410",
    "lion": "1f981",
    "tiger": "1f405",
    "bear": "1f43b",
    "raccoon": "1f99d",
    "fox": "1f98a",
    "wolf": "1f43a",
    "lizard": "1f98e",
    "beetle": "1fab2",
    "ant": "1f41c",
    "butterfly": "1f98b",
    "fish": "1f41f",
    "shark": "1f988",
    "whale": "1f433",
    "dolphin": "1f42c",
    "squirrel": "1f43f-fe0f",
    "mouse": "1f401",
    "rat": "1f400",
    "snake": "1f40d",
    "turtle": "1f422",
    "frog": "1f438",
    "chicken": "1f414",
    "duck": "1f986",
    "goose": "1fabf",
    "bee": "1f41d",
    "pig": "1f416",
    "turkey": "1f983",
    "fly": "1fab0",
    "llama": "1f999",
    "camel": "1f42a",
    "bat": "1f987",
    "gorilla": "1f98d",
    "hedgehog": "1f994",
    "kangaroo": "1f998",
    "snail": "1f40c",
    "hippopotamus": "1f99b",
    "cheetah": "1f406",
    "crocodile": "1f40a",
    "lobster": "1f99e",
    "octopus": "1f419",
    "plate": "1f37d-fe0f",
    "bicycle": "1f6b2",
    "pawn": "265f-fe0f",
    "basket": "1f9fa",
    "car": "1f697",
    "football": "26bd",
}
