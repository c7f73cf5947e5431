"""Examples of GSM8K by programs: how questions of its training set begin, and bodies of `solution`
that were written for this project."""

SOLUTIONS = {
    "Natalia sold clips to 48": """\
    clips_in_april = 48
    clips_in_may = clips_in_april / 2
    return clips_in_april + clips_in_may
""",
    "Julie is reading a 120-page book": """\
    pages = 120
    read_yesterday = 12
    read_today = 2 * read_yesterday
    remaining = pages - read_yesterday - read_today
    return remaining / 2
""",
    "A deep-sea monster rises": """\
    people_eaten = 847
    # Each ship carries twice as many people as the one before: first, 2 * first, 4 * first.
    shares = 1 + 2 + 4
    return people_eaten / shares
""",
    "Five friends eat at a fast-food chain": """\
    friends = 5
    hamburgers = 5 * 3
    fries = 4 * 1.20
    soda = 5 * 0.5
    spaghetti = 2.7
    bill = hamburgers + fries + soda + spaghetti
    return bill / friends
""",
    "Marcy is a makeup artist": """\
    tubs = 6
    tubes = tubs * 2
    people_per_tube = 3
    return tubes * people_per_tube
""",
    "Tom uses 10 weight plates": """\
    weight = 10 * 30
    heavier_when_lowered = 1 + 20 / 100
    return weight * heavier_when_lowered
""",
    "Rafael works 10 hours on Monday": """\
    hours_so_far = 10 + 8
    hours = hours_so_far + 20
    pay_per_hour = 20
    return hours * pay_per_hour
""",
    "Mrs. Thompson bought 3 chickens": """\
    paid = 15
    chickens = 3 * 3
    return paid - chickens
""",
}
