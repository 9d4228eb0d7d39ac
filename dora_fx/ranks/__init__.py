"""Many processes as one: their groups, what they tell each other, and what they must agree on."""
