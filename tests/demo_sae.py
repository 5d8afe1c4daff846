"""A feature of the demo SAE that tests steer by, and what its files say of it."""

from __future__ import annotations

from typing import Final

#: "elves and other fantasy peoples (orcs, dwarves, trolls)"
ELVES: Final = 4435
ELVES_MAX_ACTIVATION: Final = 37.7
