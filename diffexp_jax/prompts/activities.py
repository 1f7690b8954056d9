"""The activities: the three of DDPO and DiffExp, and three of our own for prompts that fine-tuning never sees.

Source of the first three, and of their order: `activities.txt` of ddpo-pytorch.
"""

SEEN = ("washing the dishes", "riding a bike", "playing chess")

UNSEEN = ("doing laundry", "driving a car", "playing soccer")
