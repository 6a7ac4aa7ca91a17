"""The numbers that a number can be divided by: what an error offers, and what a choice of sizes goes through."""


def divisors(n: int) -> list[int]:
    """All divisors of n, 1 or more, in growing order; none for 0."""
    return [d for d in range(1, n + 1) if n % d == 0]
