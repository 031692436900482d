"""Compute a seed for every place that needs random numbers, from its coordinates.

No generator's state is ever saved. A step, a batch or a sample seeds a generator with
``fold_in(seed, ...its coordinates...)`` and draws from it; the numbers are then the same whatever ran before,
whichever worker asks, and after any resume.
"""

_MASK = 0xFFFF_FFFF_FFFF_FFFF
# 2**64 / golden ratio, odd, and the two multipliers of the finalizer: Steele, Lea and Flood, "Fast splittable
# pseudorandom number generators" (OOPSLA 2014), in Stafford's variant 13, which java.util and NumPy use too.
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_MIX_1 = 0xBF58_476D_1CE4_E5B9
_MIX_2 = 0x94D0_49BB_1331_11EB


def fold_in(seed: int, *coordinates: int) -> int:
    """Compute the seed of the place ``coordinates`` in the run ``seed``, in ``0 .. 2**64 - 1``.

    With G, M1, M2 the constants of splitmix64, all arithmetic modulo 2**64 and x the bits of each coordinate::

        h = seed * G + G
        h = ((h ^ (h >> 32) ^ x) * M1) + G           once for each coordinate x, in order
        h = ((h ^ (h >> 29)) * M2),  result = h ^ (h >> 32)

    Each line is a bijection of h, and of x for a fixed h: with the other arguments equal, two different
    coordinates (or seeds) never give the same result. The order and the number of coordinates matter:
    ``fold_in(s, 1, 2)``, ``fold_in(s, 2, 1)`` and ``fold_in(s, 1, 2, 0)`` differ. For hashing, not for secrets.

    Args:
        seed: the run's seed; any integer, taken modulo 2**64.
        *coordinates: what tells this place from the others, for instance a purpose, an epoch, a sample index;
            any integers, taken modulo 2**64.

    Note:
        Legal for ``torch.Generator.manual_seed`` on every device. torch's generator on the CPU (mt19937) keeps
        the low 32 bits only, so two of n places share their numbers there with odds of about n**2 / 2**33.

    Example:
        >>> fold_in(0, 1, 2) == fold_in(0, 1, 2), fold_in(0, 1, 2) == fold_in(0, 2, 1)
        (True, False)
    """
    h = (seed * _GOLDEN + _GOLDEN) & _MASK
    for x in coordinates:
        h = ((h ^ (h >> 32) ^ x) * _MIX_1 + _GOLDEN) & _MASK
    h = ((h ^ (h >> 29)) * _MIX_2) & _MASK
    return h ^ (h >> 32)
