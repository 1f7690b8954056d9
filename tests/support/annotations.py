"""The check of the package's annotations, which conftest.py asks for by this module's name."""

import beartype

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int passes for a float
