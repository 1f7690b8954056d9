"""The activities: the three of fine-tuning, and three that fine-tuning never sees.

Sources: the first three and their order, `activities.txt` of ddpo-pytorch; the unseen three, Table 2 of DiffExp's
appendix (Chae et al. 2025).
"""

SEEN = ("washing the dishes", "riding a bike", "playing chess")

UNSEEN = ("doing laundry", "driving a car", "playing soccer")
