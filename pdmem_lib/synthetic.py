"""Conversations in LoCoMo's format that were never published, so that no model can know an answer without the memory.

Our own design [D]; only the format follows LoCoMo (see locomo.py). Two speakers talk about themselves and the people
around them. A fact is one turn, among greetings and small talk. Every second fact has a twin told by the other speaker
about themselves with another answer, which interferes; a fact without a twin gives an adversarial question. All values
of a kind are drawn without repeats, afresh for each conversation.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import cycle
from typing import NamedTuple

from .locomo import Conversation, parse
from .settings import whole_number

NAMES = """Amara Bruno Celeste Dario Edith Farid Greta Hugo Imani Jonas Keiko Lorenz Mirja Nadia Oskar Paloma Quentin
    Rosalie Stellan Tamsin Ulrich Verena Wendel Xenia Yusuf Zelda Anselm Birgit Corin Delphine""".split()
CIRCLE = "sister", "brother", "cousin", "neighbour", "flatmate", "boss", "uncle"  # the speaker themselves come on top


class Kind(NamedTuple):
    """A kind of fact. {who} is "I" or "My cousin" in what is said, "Greta" or "Hugo's cousin" in what is asked."""

    said: str
    asked: str
    values: Sequence[str] = ()
    inferred: str = ""  # a second, open-domain way of asking
    days: int = 0  # instead of values: a date after (1) or before (-1) the session


KINDS = [
    Kind("{who} adopted a puppy from the shelter and named it {v}.", "What did {who} name the puppy?",
         """Biscuit Pepper Mango Ziggy Clover Truffle Bandit Nimbus Pickle Waffle Juniper Domino Sprocket Bramble Gizmo
         Tango Noodle Comet Fidget Button""".split()),
    Kind("{who} moved to {v} in the end, with forty boxes and a piano.", "Which town did {who} move to?",
         """Utrecht Bergen Tartu Girona Lucca Aarhus Kendal Ghent Brno Cork Graz Turku Evora Zadar Leeds Halifax Cusco
         Nara Tromso Dunedin""".split(), "Which town's bus map would be of use to {who}?"),
    Kind("{who} started a new job as a {v}, and the first week went well.", "What is the new job of {who}?",
         """baker plumber librarian translator surveyor florist radiographer carpenter beekeeper locksmith midwife
         glazier paramedic tailor botanist welder chemist printer shepherd pilot""".split(),
         "Which trade's magazine would {who} read for work?"),
    Kind("{who} took up {v} this month, and it was love at first try.", "Which hobby did {who} take up?",
         """archery origami fencing pottery juggling calligraphy bouldering birdwatching crochet falconry rowing
         woodcarving stargazing geocaching bookbinding kayaking squash embroidery curling taxidermy""".split(),
         "What would a weekend course that {who} enjoys be about?"),
    Kind("{who} cooked {v} for the whole street on Sunday.", "What did {who} cook for the street?",
         """paella goulash ramen moussaka risotto borscht laksa jambalaya pierogi shakshuka gumbo ratatouille bibimbap
         enchiladas tagine lasagne rendang pho dumplings chowder""".split()),
    Kind("{who} bought a second-hand {v} at the flea market.", "Which instrument did {who} buy?",
         """cello banjo trombone mandolin harp bassoon clarinet ukulele zither harmonica lute trumpet viola sitar
         piccolo theremin saxophone bugle dulcimer tuba""".split(),
         "Lessons on what would be a fitting gift for {who}?"),
    Kind("{who} booked a flight to {v}, window seat and all.", "Which country did {who} book a flight to?",
         """Portugal Vietnam Iceland Morocco Peru Estonia Jordan Nepal Chile Malta Georgia Kenya Croatia Uruguay Bhutan
         Senegal Cyprus Laos Slovenia Oman""".split(), "Which country's phrase book would {who} need?"),
    Kind("{who} painted the kitchen {v}, ceiling included.", "What colour did {who} paint the kitchen?",
         """teal mustard lavender coral turquoise crimson ivory olive peach indigo scarlet maroon beige mint salmon
         charcoal lilac amber magenta navy""".split()),
    Kind("{who} planted a {v} tree behind the house.", "Which tree did {who} plant?",
         """quince walnut cherry mulberry plum hazel pomelo fig medlar willow rowan magnolia birch linden cedar pear
         chestnut maple larch spruce""".split()),
    Kind("{who} left a {v} on the train, and it never turned up again.", "What did {who} leave on the train?",
         """rucksack camera briefcase kettle scarf laptop suitcase tripod skateboard notebook helmet thermos lantern
         tablecloth wallet passport drill pillow telescope raincoat""".split()),
    Kind("{who} read {v} in one night and cried at the end.", "Which book did {who} read in one night?",
         [f"{a} {b}" for a in "Glass Salt Paper Ninth Hollow Copper".split()
          for b in "Orchard Lighthouse Ferry Winter Cartographer".split()]),
    Kind("{who} will run the charity race on {v}, come rain or shine.", "When will {who} run the race?", days=1),
    Kind("{who} will audition for the city choir on {v}.", "When will {who} audition for the choir?", days=1),
    Kind("{who} got the keys to the new studio on {v}.", "When did {who} get the keys to the studio?", days=-1),
    Kind("{who} got back from hospital on {v}, all mended.", "When did {who} get back from hospital?", days=-1),
]
HELLO = [("Hey {b}, good to hear from you! How are things?", "Hi {a}! Busy as ever, but I can't complain."),
         ("Hello {b}! It has been a while, hasn't it?", "It has, {a}! I was just thinking of you."),
         ("Morning, {b}! Do you have a minute to chat?", "For you, {a}, always. Let me put the phone on speaker.")]
BYE = [("I have to run, the bus is coming. Talk soon, {b}!", "Take care, {a}, and keep me posted."),
       ("Right, dinner won't make itself. Bye, {b}!", "Bye, {a}! This was fun."),
       ("My battery is nearly flat. Until next time, {b}!", "Until then, {a}. Sleep well!")]
MONTHS = "January February March April May June July August September October November December".split()
FACTS_PER_SESSION = 4
SMALL_TALK = [
    ("The rain has not stopped since Tuesday here.", "Same on this side. My boots will never dry."),
    ("I slept terribly, the street was loud all night.", "Oh no. Earplugs saved me last summer."),
    ("Did you watch the match in the end?", "Only the second half, and then I fell asleep."),
    ("The lift in our building is broken again.", "That is one way to stay fit, I suppose."),
    ("I finally cleared out the attic.", "I should do that too. Did you find anything good?"),
    ("Work has been one meeting after another.", "Tell me about it. My calendar looks like a brick wall."),
    ("Do you still drink that much coffee?", "Three cups, down from five. I am rather proud."),
    ("I keep forgetting all my passwords.", "Write them on paper, that is what everyone does in secret."),
    ("The new café on the corner is quite nice.", "Then take me there when I come to visit!"),
    ("I tried to mend the tap and made it worse.", "We have all been there. Call somebody before it floods."),
    ("The days are getting shorter, have you noticed?", "I have, and I don't like it one bit."),
    ("My phone keeps correcting everything I write.", "That explains the last message you sent me!"),
]
ASKS = ["What else is new on your side?", "Tell me, what has been going on?", "And how is everybody over there?",
        "Any news? I feel like I missed a lot.", "Come on, I want to hear something good."]
REACTIONS = ["Really? I would not have guessed that.", "Oh, that is quite something!", "I am glad you told me.",
             "No way! Tell me more next time.", "Ha, that sounds like a story for later."]


def synthetic_conversations(n: int, sessions: int, seed: int, turns_per_session: int = 20) -> list[Conversation]:
    """`n` conversations as `locomo.parse` gives them; the arguments are those of `synthetic_locomo`."""
    return parse(synthetic_locomo(n, sessions, seed, turns_per_session))


def synthetic_locomo(n: int, sessions: int, seed: int, turns_per_session: int = 20) -> list[dict]:
    """`n` conversations in LoCoMo's JSON format, each of `sessions` sessions of `turns_per_session` turns, give or take
    a fifth. Answers have one or two words; the evidence turn holds them word for word (category 1: one half in each of
    two turns; category 5: it holds the adversarial answer). From three facts on, all five categories are asked.

    The same seed gives the same data, and conversation i is the same for every n. ValueError for n or sessions below 1,
    for fewer than 8 turns a session, and for what is no whole number.
    """
    n, sessions = whole_number("n", n), whole_number("sessions", sessions)
    turns_per_session = whole_number("turns_per_session", turns_per_session)
    if n < 1 or sessions < 1 or turns_per_session < 8:
        found = f"n={n}, sessions={sessions}, turns_per_session={turns_per_session}"
        raise ValueError(f"{found} is too little to talk about: give at least 1, 1 and 8.")
    ids = [f"synthetic-{seed}-{i}" for i in range(n)]
    return [_record(random.Random(id), id, sessions, turns_per_session) for id in ids]


def _record(rng: random.Random, sample_id: str, sessions: int, turns_per_session: int) -> dict:
    names = rng.sample(NAMES, 2)
    spread = turns_per_session // 5
    lengths = [rng.randint(turns_per_session - spread, turns_per_session + spread) for _ in range(sessions)]
    exchanges = [(length - 4) // 2 for length in lengths]  # pairs of turns between the greeting and the goodbye
    slots = [(s, e) for s, n in enumerate(exchanges) for e in rng.sample(range(n), min(n, FACTS_PER_SESSION))]
    fact_at = dict(zip(rng.sample(slots, len(slots)), _facts(rng)))  # any fact at any time: lags of all lengths

    small_talk = cycle(rng.sample(SMALL_TALK, len(SMALL_TALK)))
    unused = [rng.sample(kind.values, len(kind.values)) for kind in KINDS]
    told: dict[tuple[int, str, int], tuple[str, str]] = {}  # kind, role, speaker -> value, dia_id
    dates: dict[int, set[str]] = defaultdict(set)
    conversation: dict = {"speaker_a": names[0], "speaker_b": names[1]}
    day = datetime(2023, 1, 9)
    for s, length in enumerate(lengths):
        day += timedelta(days=rng.randint(2, 16))
        first = rng.randrange(2)
        lines = list(rng.choice(HELLO))
        for e in range(exchanges[s]):
            if (s, e) not in fact_at:
                lines += next(small_talk)
                continue
            k, role, speaker = fact_at[s, e]
            value = unused[k].pop() if KINDS[k].values else _date(rng, KINDS[k].days, day, dates[k])
            said = KINDS[k].said.format(who=f"My {role}" if role else "I", v=value)
            lines += [said, rng.choice(REACTIONS)] if speaker == first else [rng.choice(ASKS), said]
            dates[k].add(value)
            told[k, role, speaker] = value, f"D{s + 1}:{len(lines) - (speaker == first)}"
        lines += [*rng.choice(BYE), "You too!"][: 2 + length % 2]
        clock = f"{rng.randint(1, 9)}:{rng.randrange(60):02} pm"
        conversation[f"session_{s + 1}_date_time"] = f"{clock} on {day.day} {MONTHS[day.month - 1]}, {day.year}"
        conversation[f"session_{s + 1}"] = [
            {"speaker": names[who], "dia_id": f"D{s + 1}:{i}", "text": text.format(a=names[first], b=names[1 - first])}
            for i, (text, who) in enumerate(zip(lines, [first, 1 - first] * length), start=1)
        ]
    questions = list(_questions(names, told))
    return {"sample_id": sample_id, "conversation": conversation, "qa": rng.sample(questions, len(questions))}


def _facts(rng: random.Random) -> Iterator[tuple[int, str, int]]:
    """All facts there are to tell, as (kind, role, speaker), in the order of their claim to a place.

    Role "" is the speaker. Every second fact is followed by its twin; the first three are enough for all categories.
    """
    topics = [(k, role) for k in range(len(KINDS)) for role in ("", *CIRCLE)]
    opening = [rng.choice([(k, role) for k, role in topics if KINDS[k].inferred])]
    opening += [rng.choice([(k, role) for k, role in topics if KINDS[k].days])]
    rest = [topic for topic in topics if topic not in opening]
    for place, (k, role) in enumerate(opening + rng.sample(rest, len(rest))):
        speaker = rng.randrange(2)
        yield k, role, speaker
        if place % 2 == 0:
            yield k, role, 1 - speaker


def _date(rng: random.Random, days: int, day: datetime, taken: set[str]) -> str:
    """A day like "7 May", 2 to 40 days after (days=1) or before (-1) the session's, and not among those taken."""
    dates = (day + timedelta(days=days * distance) for distance in rng.sample(range(2, 41), 39))
    return next(text for date in dates if (text := f"{date.day} {MONTHS[date.month - 1]}") not in taken)


def _questions(names: list[str], told: dict[tuple[int, str, int], tuple[str, str]]) -> Iterator[dict]:
    """LoCoMo's rows: each fact asked, inferred from where it can be, and asked with its twin or of the wrong person."""
    for (k, role, speaker), (value, dia_id) in told.items():
        kind, twin = KINDS[k], told.get((k, role, 1 - speaker))
        who, other = (f"{names[i]}'s {role}" if role else names[i] for i in (speaker, 1 - speaker))
        answered = {"answer": value, "evidence": [dia_id]}
        yield {"question": kind.asked.format(who=who), **answered, "category": 2 if kind.days else 4}
        if kind.inferred:
            yield {"question": kind.inferred.format(who=who), **answered, "category": 3}
        if twin is None:
            question = kind.asked.format(who=other)
            yield {"question": question, "adversarial_answer": value, "evidence": [dia_id], "category": 5}
        elif speaker == 0 and not kind.days:
            question = kind.asked.format(who=f"each of {who} and {other}")
            yield {"question": question, "answer": f"{value}, {twin[0]}", "evidence": [dia_id, twin[1]], "category": 1}
