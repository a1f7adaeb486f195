"""The kinds of generated word problems, and their few building blocks.

    rng -> numbers and names -> steps (a line of the solution and its calculation) -> Problem

A kind draws freely: an unsuitable result (a fraction, a negative count, a 1 that would need a
singular) raises `RedrawError` in `step`, and the caller tries the kind again. To add a kind, write
one function and list it in `KINDS`.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class RedrawError(Exception):
    """The numbers drawn do not make a sensible problem."""


@dataclass(frozen=True)
class Step:
    """One line of a solution; formats as its value, so that later steps can refer to it."""

    text: str  # holds one `?` (or `$?`) where the calculation goes
    expression: str
    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Problem:
    """A question and the steps that solve it; the value of the last step is the answer."""

    question: str
    steps: tuple[Step, ...]


class Person(NamedTuple):
    """A name and its pronouns; formats as the name."""

    name: str
    they: str
    They: str
    their: str

    def __str__(self) -> str:
        return self.name


HER_NAMES = (
    "Aisha Anna Chloe Elif Emma Fatima Grace Hana Julia Keiko Lena Maria Olga Priya Yara Zoe"
)
HIS_NAMES = "Adam Ben Carlo Diego Emil Felix Hugo Ivan Kenji Kofi Leo Liam Noah Omar Peter Ravi"
PEOPLE = [Person(name, "she", "She", "her") for name in HER_NAMES.split()]
PEOPLE += [Person(name, "he", "He", "his") for name in HIS_NAMES.split()]
FRACTIONS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 8: "an eighth"}
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def step(text: str, expression: str) -> Step:
    """Evaluate `expression`, whole numbers with either + and - or * and /, from left to right.

    Raises:
        RedrawError: the result is not whole, or is below 2.
        ValueError: the expression would need operator precedence.
    """
    first, *rest = re.split(r"([-+*/])", expression)
    operators, operands = rest[::2], [int(operand) for operand in rest[1::2]]
    if not (set(operators) <= set("+-") or set(operators) <= set("*/")):
        raise ValueError(f"expression={expression!r} needs precedence; write it as two steps")
    value = int(first)
    for operator, operand in zip(operators, operands, strict=True):
        if operator == "+":
            value += operand
        elif operator == "-":
            value -= operand
        elif operator == "*":
            value *= operand
        else:
            value, remainder = divmod(value, operand)
            if remainder:
                raise RedrawError(expression)
    if value < 2:
        raise RedrawError(expression)
    return Step(text, expression, value)


# The kinds. Nouns form their plural with a plain s, and every count is at least 2.
# The phrasings are prose, three per kind, laid out to be read.
# fmt: off


def shopping_with_change(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    a, b = rng.sample(["notebook", "pen", "folder", "marker", "ruler", "calendar", "stapler"], 2)
    num_a, num_b = rng.randint(2, 9), rng.randint(2, 9)
    price_a, price_b = rng.sample(range(2, 16), 2)
    cost_a = step(f"The {a}s cost $?.", f"{num_a}*{price_a}")
    cost_b = step(f"The {b}s cost $?.", f"{num_b}*{price_b}")
    total = step("Together that is $?.", f"{cost_a}+{cost_b}")
    paid = 50 * (total.value // 50 + 1)
    change = step(f"So {p.they} gets $? back.", f"{paid}-{total}")
    return Problem(rng.choice([
        f"{p} buys {num_a} {a}s for ${price_a} each and {num_b} {b}s for ${price_b} each. {p.They} "
        f"pays with ${paid}. How much change does {p.they} get, in dollars?",
        f"A {a} costs ${price_a} and a {b} costs ${price_b}. {p} takes {num_a} {a}s and {num_b} "
        f"{b}s to the counter and hands over ${paid}. How many dollars does {p.they} get back?",
        f"With ${paid}, {p} goes to a shop where each {a} costs ${price_a} and each {b} costs "
        f"${price_b}. {p.They} buys {num_a} {a}s and {num_b} {b}s. How many dollars are left?",
    ]), (cost_a, cost_b, total, change))


def travel(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    goes, slowest, fastest = rng.choice([("drives", 35, 70), ("cycles", 8, 19), ("sails", 5, 16)])
    speed_a, speed_b = rng.sample(range(slowest, fastest + 1), 2)
    hours_a, hours_b = rng.randint(2, 6), rng.randint(2, 6)
    part_a = step(f"In the first {hours_a} hours {p} covers ? miles.", f"{speed_a}*{hours_a}")
    part_b = step(f"In the next {hours_b} hours {p.they} covers ? miles.", f"{speed_b}*{hours_b}")
    covered = step("Together that is ? miles.", f"{part_a}+{part_b}")
    route = covered.value + rng.randint(10, 90)
    left = step(f"So {p.they} still has ? miles to go.", f"{route}-{covered}")
    return Problem(rng.choice([
        f"{p} {goes} for {hours_a} hours at {speed_a} miles per hour and then for {hours_b} hours "
        f"at {speed_b} miles per hour. The route is {route} miles long. How many miles does "
        f"{p.they} still have to go?",
        f"A route of {route} miles lies ahead of {p}. {p.They} {goes} for {hours_a} hours at "
        f"{speed_a} miles per hour, has a rest, and then {goes} for {hours_b} more hours at "
        f"{speed_b} miles per hour. How many miles are left?",
        f"On a journey of {route} miles, {p} {goes} at {speed_a} miles per hour for the first "
        f"{hours_a} hours and at {speed_b} miles per hour for the next {hours_b} hours. How far is "
        f"{p.they} from the end of the journey then, in miles?",
    ]), (part_a, part_b, covered, left))


def ages(rng: Random) -> Problem:
    p, q, r = rng.sample(PEOPLE, 3)
    age, factor, younger = rng.randint(4, 15), rng.randint(2, 4), rng.randint(2, 12)
    years = rng.randint(2, 15)
    age_q = step(f"{q} is ? years old.", f"{age}*{factor}")
    age_r = step(f"{r} is ? years old.", f"{age_q}-{younger}")
    now = step("Today the three of them are ? years old together.", f"{age}+{age_q}+{age_r}")
    gain = step(f"In {years} years they will have gained ? years together.", f"3*{years}")
    then = step("So their ages will add up to ?.", f"{now}+{gain}")
    return Problem(rng.choice([
        f"{p} is {age} years old. {q} is {TIMES[factor]} as old as {p}, and {r} is {younger} years "
        f"younger than {q}. What will the sum of their ages be in {years} years?",
        f"{r} is {younger} years younger than {q}, who is {TIMES[factor]} as old as {p}. If {p} is "
        f"{age} now, how old will the three of them be in total {years} years from now?",
        f"{p} has just turned {age}. {p}'s cousin {q} is {TIMES[factor]} as old and {younger} "
        f"years older than {r}. In {years} years, what will the ages of all three add up to?",
    ]), (age_q, age_r, now, gain, then))


def fractions_of_a_group(rng: Random) -> Problem:
    things, place, first, second, third = rng.choice([
        ("students", "a school", "walked to school", "came by bus", "came by bicycle"),
        ("books", "a library", "were novels", "were comics", "were about history"),
        ("trees", "an orchard", "bore apples", "bore pears", "bore plums"),
        ("guests", "a hotel", "ordered tea", "ordered coffee", "ordered juice"),
    ])
    (a, a_words), (b, b_words) = rng.choices(list(FRACTIONS.items()), k=2)
    num = a * b * rng.randint(3, 1200 // (a * b))
    num_first = step(f"? {things} {first}.", f"{num}/{a}")
    others = step(f"That leaves ? {things}.", f"{num}-{num_first}")
    num_second = step(f"Of those, ? {second}.", f"{others}/{b}")
    num_third = step(f"The other ? {things} {third}.", f"{others}-{num_second}")
    return Problem(rng.choice([
        f"There were {num} {things} in {place}. {a_words.capitalize()} of them {first}, and "
        f"{b_words} of the others {second}. The rest {third}. How many {things} {third}?",
        f"Of the {num} {things} in {place}, {a_words} {first}. Of the remaining {things}, "
        f"{b_words} {second} and the rest {third}. How many {things} {third}?",
        f"A survey of {num} {things} in {place} found that {a_words} of them {first}. "
        f"{b_words.capitalize()} of the remaining ones {second}, and all the other {things} "
        f"{third}. How many {things} {third}?",
    ]), (num_first, others, num_second, num_third))


def discount(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    thing = rng.choice(["jacket", "lamp", "chair", "backpack", "blanket", "kettle", "suitcase"])
    price, percent = rng.randrange(20, 201, 5), rng.randrange(10, 61, 5)
    num, coupon = rng.randint(2, 8), rng.randint(2, 9)
    saved = step(f"The discount on one {thing} is $?.", f"{price}*{percent}/100")
    reduced = step(f"So each {thing} costs $?.", f"{price}-{saved}")
    total = step(f"The {num} {thing}s cost $?.", f"{num}*{reduced}")
    paid = step(f"With the coupon, {p} pays $?.", f"{total}-{coupon}")
    return Problem(rng.choice([
        f"A {thing} normally costs ${price}, but today it is {percent}% off. {p} buys {num} "
        f"{thing}s and has a coupon for ${coupon} off the total. How many dollars does {p.they} "
        "pay?",
        f"{p} needs {num} {thing}s. The regular price is ${price} each, and the shop takes "
        f"{percent}% off. At the counter, a coupon lowers the bill by ${coupon}. How much does "
        f"{p.they} pay, in dollars?",
        f"In a sale, every {thing} is {percent}% below its usual price of ${price}. How many "
        f"dollars does {p} spend on {num} {thing}s with a coupon for ${coupon} off the total?",
    ]), (saved, reduced, total, paid))


def overtime(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    place = rng.choice(["bakery", "garage", "hospital", "hotel", "library", "post office", "zoo"])
    wage, extra, limit = rng.randint(11, 40), rng.randint(3, 12), rng.choice([30, 35, 38, 40])
    hours = limit + rng.randint(2, 15)
    base = step(f"For the first {limit} hours {p} earns $?.", f"{limit}*{wage}")
    over = step(f"{p} works ? hours of overtime.", f"{hours}-{limit}")
    rate = step("An hour of overtime pays $?.", f"{wage}+{extra}")
    bonus = step("The overtime pays $?.", f"{over}*{rate}")
    total = step(f"In all, {p.they} earns $?.", f"{base}+{bonus}")
    return Problem(rng.choice([
        f"At the {place}, {p} earns ${wage} an hour for the first {limit} hours of a week and "
        f"${extra} more than that for each hour of overtime. How many dollars does {p.they} earn "
        f"in a {hours}-hour week?",
        f"{p} works {hours} hours at the {place} this week. The first {limit} hours are paid at "
        f"${wage} an hour, and every hour beyond that pays ${extra} more. How much does {p.they} "
        "earn this week, in dollars?",
        f"The hourly wage at the {place} is ${wage}, and it rises by ${extra} for hours above "
        f"{limit} a week. What is the pay of {p}, in dollars, for {hours} hours in one week?",
    ]), (base, over, rate, bonus, total))


def savings(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    goal = rng.choice(["bicycle", "guitar", "tablet", "telescope", "camera", "tent", "keyboard"])
    job = rng.choice(["walking dogs", "babysitting", "mowing lawns", "delivering newspapers"])
    earned, spent, start = rng.randint(15, 40), rng.randint(3, 12), rng.randint(10, 90)
    price = start + rng.randint(4, 18) * (earned - spent)
    missing = step(f"{p} still needs $?.", f"{price}-{start}")
    kept = step(f"Each week {p.they} keeps $?.", f"{earned}-{spent}")
    weeks = step(f"So {p.they} has to save for ? weeks.", f"{missing}/{kept}")
    return Problem(rng.choice([
        f"{p} wants to buy a {goal} that costs ${price} and already has ${start}. {p.They} earns "
        f"${earned} a week by {job}, spends ${spent} of it on lunch, and saves the rest. How many "
        "weeks does that take?",
        f"A {goal} costs ${price}. Every week {p} earns ${earned} by {job}, spends ${spent} of "
        f"that, and saves the rest. If ${start} is saved already, how many weeks will it take?",
        f"By {job}, {p} makes ${earned} a week, of which ${spent} goes to bus fares. The rest is "
        f"for a {goal} with a price of ${price}. If {p.they} has ${start} now, how many weeks will "
        "it take?",
    ]), (missing, kept, weeks))


def recipe(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    dish, a, b = rng.choice([
        ("risotto", "rice", "cheese"), ("granola", "oats", "honey"), ("curry", "rice", "spinach"),
        ("crumble", "flour", "sugar"), ("shortbread", "flour", "butter"),
    ])
    serves, factor = rng.randint(2, 8), rng.randint(2, 6)
    grams_a, grams_b = rng.sample(range(40, 405, 5), 2)
    guests = serves * factor
    scale = step("The recipe has to be made ? times.", f"{guests}/{serves}")
    need_a = step(f"That takes ? grams of {a}.", f"{scale}*{grams_a}")
    need_b = step(f"It also takes ? grams of {b}.", f"{scale}*{grams_b}")
    total = step(f"So {p.they} needs ? grams of the two together.", f"{need_a}+{need_b}")
    return Problem(rng.choice([
        f"A recipe of {dish} for {serves} people calls for {grams_a} grams of {a} and {grams_b} "
        f"grams of {b}. {p} cooks for {guests} people. How many grams does {p.they} need of both "
        "together?",
        f"{p} makes {dish} for {guests} people. The recipe serves {serves} and uses {grams_a} "
        f"grams of {a} and {grams_b} grams of {b}. What is the total weight of the {a} and the {b} "
        f"that {p.they} needs, in grams?",
        f"To make {dish} for {serves}, one needs {grams_a} grams of {a} and {grams_b} grams of "
        f"{b}. How many grams of the two together does {p} need for {guests}?",
    ]), (scale, need_a, need_b, total))


def sharing(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    noun = rng.choice(["marble", "sticker", "cookie", "card", "balloon", "bead", "walnut"])
    bags, size, loose = rng.randint(3, 9), rng.randint(8, 24), rng.randint(2, 9)
    children = rng.randint(5, 12)
    each = (bags * size + loose) // children
    in_bags = step(f"The bags hold ? {noun}s.", f"{bags}*{size}")
    total = step(f"With the loose ones, {p} has ? {noun}s.", f"{in_bags}+{loose}")
    given = step(f"Each child can get {each} {noun}s, which takes ? {noun}s.", f"{children}*{each}")
    kept = step(f"So {p} keeps ? {noun}s.", f"{total}-{given}")
    return Problem(rng.choice([
        f"{p} has {bags} bags of {size} {noun}s and {loose} loose {noun}s. {p.They} gives "
        f"{children} children as many as possible, the same number to each, and keeps what is left "
        f"over. How many {noun}s does {p.they} keep?",
        f"There are {size} {noun}s in each of the {bags} bags that {p} brings, and {loose} more in "
        f"{p.their} pocket. {children} children each get the same number, as many as possible. How "
        f"many {noun}s remain for {p}?",
        f"{p} opens {bags} bags with {size} {noun}s each, adds {loose} {noun}s, and hands them out "
        f"evenly to {children} children, as many as each can have. How many {noun}s are left over?",
    ]), (in_bags, total, given, kept))


def fence(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    place = rng.choice(["garden", "meadow", "chicken yard", "playground", "vegetable patch"])
    width, gate, price = rng.randint(6, 25), rng.randint(2, 4), rng.randint(5, 20)
    length = width + rng.randint(2, 20)
    half = step("The length and the width add up to ? meters.", f"{length}+{width}")
    around = step("The distance around is ? meters.", f"2*{half}")
    fenced = step("Without the gate, ? meters need a fence.", f"{around}-{gate}")
    cost = step("The fence costs $?.", f"{fenced}*{price}")
    return Problem(rng.choice([
        f"{p} puts a fence around a rectangular {place} that is {length} meters long and {width} "
        f"meters wide, but leaves {gate} meters open for a gate. A meter of fence costs ${price}. "
        "How many dollars does the fence cost?",
        f"A rectangular {place} measures {length} meters by {width} meters. At ${price} a meter, "
        f"how much does {p} pay, in dollars, for a fence around it with a gap of {gate} meters for "
        "the gate?",
        f"The {place} of {p} is a rectangle with a length of {length} meters and a width of "
        f"{width} meters. All around it goes a fence at ${price} per meter, with a gap of {gate} "
        "meters for a gate. What is the price of the fence in dollars?",
    ]), (half, around, fenced, cost))


def comparison(rng: Random) -> Problem:
    p, q, r = rng.sample(PEOPLE, 3)
    noun = rng.choice(["stamp", "shell", "coin", "postcard", "button", "comic book", "toy car"])
    num, factor, fewer = rng.randint(8, 60), rng.randint(2, 5), rng.randint(3, 30)
    num_q = step(f"{q} has ? {noun}s.", f"{num}*{factor}")
    num_r = step(f"{r} has ? {noun}s.", f"{num_q}-{fewer}")
    total = step(f"Together they have ? {noun}s.", f"{num}+{num_q}+{num_r}")
    return Problem(rng.choice([
        f"{p} has {num} {noun}s. {q} has {TIMES[factor]} as many {noun}s as {p}, and {r} has "
        f"{fewer} fewer than {q}. How many {noun}s do the three of them have altogether?",
        f"{q} collects {noun}s and has {TIMES[factor]} as many as {p}, who has {num}. {r} would "
        f"need {fewer} more to have as many as {q}. How many {noun}s do {p}, {q} and {r} have in "
        "total?",
        f"Three friends put their {noun}s together. {p} brings {num}, {q} brings {TIMES[factor]} "
        f"that number, and {r} brings {fewer} fewer than {q}. How many {noun}s are there in all?",
    ]), (num_q, num_r, total))


def deliveries(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    noun = rng.choice(["crate", "barrel", "sack", "basket"])
    load, days = rng.randint(6, 40), rng.randint(2, 6)
    mornings, afternoons = rng.sample(range(2, 8), 2)
    trips = step(f"{p} makes ? trips a day.", f"{mornings}+{afternoons}")
    daily = step(f"A day's trips move ? {noun}s.", f"{trips}*{load}")
    moved = step(f"In {days} days that is ? {noun}s.", f"{daily}*{days}")
    stored = moved.value + rng.randint(5, 95)
    left = step(f"So ? {noun}s are left.", f"{stored}-{moved}")
    return Problem(rng.choice([
        f"There are {stored} {noun}s in a warehouse. The truck of {p} takes {load} {noun}s a trip, "
        f"and {p.they} makes {mornings} trips every morning and {afternoons} every afternoon. How "
        f"many {noun}s are left in the warehouse after {days} days?",
        f"{p} moves {noun}s from the harbor, {load} on each trip, with {mornings} trips before "
        f"lunch and {afternoons} after it. After {days} days of this, how many of the {stored} "
        f"{noun}s are still in the harbor?",
        f"For {days} days, {p} drives {mornings} times each morning and {afternoons} times each "
        f"afternoon from a farm to the market, always with {load} {noun}s. The farm had {stored} "
        f"{noun}s at first and gets no new ones. How many does it have left?",
    ]), (trips, daily, moved, left))


def unit_conversion(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    whole, part, factor, stuff, portion, sizes = rng.choice([
        ("kilogram", "gram", 1000, "flour", "bag", range(150, 501, 25)),
        ("liter", "milliliter", 1000, "juice", "bottle", range(200, 751, 25)),
        ("pound", "ounce", 16, "coffee", "bag", range(3, 11)),
        ("meter", "centimeter", 100, "ribbon", "piece", range(12, 61)),
    ])
    num, size, price = rng.randint(2, 9), rng.choice(sizes), rng.randint(2, 9)
    portions = rng.randint(num * factor // (2 * size) + 1, (num * factor - 2) // size)
    used = num * factor - portions * size
    total = step(f"{p} has ? {part}s of {stuff}.", f"{num}*{factor}")
    rest = step(f"After using some, {p.they} has ? {part}s.", f"{total}-{used}")
    sold = step(f"That makes ? {portion}s.", f"{rest}/{size}")
    income = step("They bring in $?.", f"{sold}*{price}")
    return Problem(rng.choice([
        f"A {whole} is {factor} {part}s. Of {num} {whole}s of {stuff}, {p} uses {used} {part}s, "
        f"divides the rest into {portion}s of {size} {part}s, and sells each {portion} for "
        f"${price}. How many dollars does {p.they} get?",
        f"From {num} {whole}s of {stuff}, {p} takes {used} {part}s for {p.their} own use and sells "
        f"the rest in {portion}s of {size} {part}s at ${price} a {portion}. A {whole} is {factor} "
        f"{part}s. How much money does that bring, in dollars?",
        f"{p} buys {num} {whole}s of {stuff} and keeps {used} {part}s of it. The rest is sold in "
        f"{portion}s of {size} {part}s for ${price} each. If a {whole} is {factor} {part}s, how "
        f"many dollars does {p.they} take in?",
    ]), (total, rest, sold, income))


def schedule(rng: Random) -> Problem:
    day, work = rng.choice([
        ("A school day", "lessons"), ("A shift in the factory", "work"),
        ("A day at the music camp", "rehearsal"), ("A training day", "practice"),
    ])
    start, end = rng.randint(7, 10), rng.randint(2, 6)
    lunch, num, length = rng.randrange(20, 76, 5), rng.randint(2, 4), rng.randint(5, 20)
    hours = step(f"From {start} a.m. to {end} p.m. is ? hours.", f"12-{start}+{end}")
    minutes = step("That is ? minutes.", f"{hours}*60")
    pauses = step(f"The {num} short breaks take ? minutes.", f"{num}*{length}")
    left = step(f"That leaves ? minutes for {work}.", f"{minutes}-{pauses}-{lunch}")
    return Problem(rng.choice([
        f"{day} goes from {start} a.m. to {end} p.m., with {lunch} minutes for lunch and {num} "
        f"short breaks of {length} minutes each. The rest of the time is for {work}. How many "
        "minutes is that?",
        f"{day} begins at {start} a.m. and ends at {end} p.m. There are {num} short breaks of "
        f"{length} minutes and a lunch break of {lunch} minutes. How many minutes are left for "
        f"{work}?",
        f"How many minutes of {work} are there if {day.lower()} starts at {start} a.m. and is over "
        f"at {end} p.m., but lunch takes {lunch} minutes and each of the {num} short breaks takes "
        f"{length} minutes?",
    ]), (hours, minutes, pauses, left))


def stock(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    noun = rng.choice(["lemon", "candle", "light bulb", "tennis ball", "flowerpot", "mug"])
    start, boxes, size = rng.randint(20, 150), rng.randint(3, 12), rng.randint(6, 30)
    monday, factor = rng.randint(8, 60), rng.randint(2, 4)
    delivered = step(f"The boxes hold ? {noun}s.", f"{boxes}*{size}")
    available = step(f"With them the shop has ? {noun}s.", f"{start}+{delivered}")
    tuesday = step(f"On Tuesday the shop sells ? {noun}s.", f"{monday}*{factor}")
    left = step(f"So ? {noun}s are left.", f"{available}-{monday}-{tuesday}")
    return Problem(rng.choice([
        f"The shop of {p} has {start} {noun}s and gets a delivery of {boxes} boxes with {size} "
        f"{noun}s each. It sells {monday} {noun}s on Monday and {TIMES[factor]} as many on "
        f"Tuesday. How many {noun}s are left?",
        f"{p} starts the week with {start} {noun}s in the shop, plus {boxes} new boxes of {size}. "
        f"If {monday} {noun}s are sold on Monday and {TIMES[factor]} that number on Tuesday, how "
        f"many does {p.they} still have?",
        f"On Monday {p} sells {monday} {noun}s in the shop, on Tuesday {TIMES[factor]} as many. "
        f"Before that there were {start} on the shelf and {boxes} full boxes of {size} in the back "
        f"room. How many {noun}s does the shop have after Tuesday?",
    ]), (delivered, available, tuesday, left))


def production(rng: Random) -> Problem:
    noun = rng.choice(["toy", "bottle", "shoe", "clock", "bulb", "screw", "spoon"])
    slow, faster = rng.randint(12, 90), rng.randint(3, 40)
    hours, faulty = rng.randint(3, 12), rng.randint(5, 60)
    fast = step(f"The faster line makes ? {noun}s an hour.", f"{slow}+{faster}")
    hourly = step(f"Both lines together make ? {noun}s an hour.", f"{slow}+{fast}")
    made = step(f"In {hours} hours they make ? {noun}s.", f"{hourly}*{hours}")
    good = step(f"Without the faulty ones, ? {noun}s remain.", f"{made}-{faulty}")
    return Problem(rng.choice([
        f"A factory has two production lines. The first makes {slow} {noun}s an hour, the second "
        f"{faster} more than that. In {hours} hours, {faulty} of all the {noun}s made turn out "
        "faulty. How many good ones are there?",
        f"One machine produces {slow} {noun}s per hour and a newer one produces {faster} more per "
        f"hour than the first. Both run for {hours} hours, and {faulty} {noun}s are thrown away. "
        f"How many {noun}s are kept?",
        f"Two lines run side by side for {hours} hours. Each hour {slow} {noun}s come from the old "
        f"line, while the new line makes {faster} more than the old one. If {faulty} {noun}s fail "
        "the final check, how many pass it?",
    ]), (fast, hourly, made, good))


def reading(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    daily, days, last = rng.randint(8, 40), rng.randint(3, 9), rng.randint(2, 4)
    pages = daily * days + last * rng.randint(daily + 2, 3 * daily)
    read = step(f"In {days} days {p} reads ? pages.", f"{daily}*{days}")
    rest = step("That leaves ? pages.", f"{pages}-{read}")
    share = step(f"On each of the last days {p.they} has to read ? pages.", f"{rest}/{last}")
    extra = step("That is ? pages more than before.", f"{share}-{daily}")
    return Problem(rng.choice([
        f"A book has {pages} pages. {p} reads {daily} pages a day for {days} days and then "
        f"finishes it in {last} more days, with the same number of pages on each. How many pages a "
        "day more than before is that?",
        f"{p} has to read {pages} pages for school. For {days} days {p.they} reads {daily} pages a "
        f"day, and in the last {last} days {p.they} reads the rest, the same number of pages each "
        "day. By how many pages does the daily reading grow?",
        f"After {days} days with {daily} pages a day, {p} wants to finish a book of {pages} pages "
        f"in {last} more days, with the same number of pages on each. How many more pages a day "
        f"must {p.they} read than in the first days?",
    ]), (read, rest, share, extra))


def average_score(rng: Random) -> Problem:
    p = rng.choice(PEOPLE)
    subject = rng.choice(["math", "history", "biology", "French", "chemistry", "geography"])
    scores = [rng.randint(55, 95) for _ in range(3)]
    average = rng.randint(65, 90)
    needed = step("For that average, all four scores have to add up to ? points.", f"4*{average}")
    so_far = step(f"The first three scores of {p} add up to ? points.", "+".join(map(str, scores)))
    last = step(f"So {p.they} needs ? points.", f"{needed}-{so_far}")
    if last.value > 100:
        raise RedrawError("no test gives more than 100 points")
    a, b, c = scores
    return Problem(rng.choice([
        f"{p} scored {a}, {b} and {c} points in three {subject} tests. How many points does "
        f"{p.they} need in the fourth test for an average of {average} points over all four?",
        f"There are four {subject} tests in a year, and {p} aims at an average of {average} "
        f"points. In the first three, {p.their} scores were {a}, {b} and {c}. What score in the "
        "last test gives exactly that average?",
        f"To pass the {subject} course with honors, {p} needs an average of {average} points in "
        f"four tests. With {a}, {b} and {c} points so far, how many points must {p.they} score in "
        "the last one, at least?",
    ]), (needed, so_far, last))


KINDS = (
    shopping_with_change, travel, ages, fractions_of_a_group, discount, overtime, savings, recipe,
    sharing, fence, comparison, deliveries, unit_conversion, schedule, stock, production, reading,
    average_score,
)
