"""A run on several ranks: how they start, agree, stop together, and end when one of them fails."""
