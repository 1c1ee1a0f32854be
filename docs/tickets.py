"""Writes examples/tickets.csv, a table to try: 300 messages to a shop, each with the team that answers it.

    python docs/tickets.py    # a test fails if the file differs

The messages are put together from the parts below, so nobody wrote them and everybody may use them.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

ROWS = 300
TABLE = Path(__file__).parents[1] / "examples" / "tickets.csv"

THINGS = ("kettle", "desk lamp", "rain jacket", "pair of boots", "headset", "bookshelf", "bicycle pump", "tent")
THINGS += ("blender", "backpack", "garden hose", "wall clock", "keyboard", "water bottle", "tool box", "yoga mat")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "the 3rd", "the 17th", "the 29th")
SUMS = ("12.50", "19.99", "34.00", "49.90", "62.75", "88.20", "105.00", "149.00")

# {thing}, {day} and {sum} are filled in.
TEAMS = {
    "delivery": (
        "My {thing} was supposed to arrive on {day} and it is still not here.",
        "The tracking page has not changed since {day}. Where is my {thing}?",
        "The driver left my {thing} with a neighbour I don't know.",
        "Can you send the {thing} to my office instead? I am not at home before {day}.",
        "I ordered a {thing} on {day}; when will it be shipped?",
        "The parcel that came on {day} was empty, there was no {thing} in it.",
        "Nobody rang, but the courier says he tried to bring the {thing} on {day}.",
        "Your e-mail says that the {thing} was delivered on {day}. It was not.",
        "I only got one of the two parcels; the {thing} is missing.",
        "Please keep my {thing} until {day}, we are on holiday.",
    ),
    "returns": (
        "The {thing} is broken, I want to send it back.",
        "I got a {thing} in the wrong colour. How do I exchange it?",
        "Please send me a label so that I can return the {thing}.",
        "I sent the {thing} back on {day}. Has it reached you?",
        "The {thing} is smaller than in the picture and I don't want to keep it.",
        "How long do I have to give back a {thing} that I bought on {day}?",
        "The {thing} stopped working after one day. Can I have a new one?",
        "One part of the {thing} is missing, so I would like my money back.",
        "My {thing} came scratched and dented.",
        "Where do I take the {thing} that I want to give back?",
    ),
    "billing": (
        "I was charged {sum} twice for the same {thing}.",
        "Why is there a fee of {sum} on my invoice?",
        "I need an invoice with my company's name for the {thing}, {sum} in all.",
        "My card was debited {sum} on {day}, but I cancelled before that.",
        "The voucher was not taken off the price of the {thing}.",
        "Can I pay the {sum} in two parts?",
        "Your reminder says that {sum} are open, but I paid on {day}.",
        "I have not got back the {sum} that you promised me on {day}.",
        "The {thing} cost {sum} in the shop, and you took more.",
        "Which bank account do I pay the {sum} to?",
    ),
    "account": (
        "I can't log in since {day}, the password is always wrong.",
        "Please delete my account and everything you know about me; my last order was the {thing}.",
        "I have a new e-mail address since {day}. How do I change it?",
        "The link for a new password that I asked for on {day} never came.",
        "Somebody ordered a {thing} with my account. It was not me.",
        "Stop sending me the newsletter, I only bought a {thing}.",
        "I have two accounts since {day}; can you put them together?",
        "It says that my account has been locked since {day}.",
        "My name is wrong in my profile. Please correct it.",
        "How do I turn on the second step at login? I have a new telephone since {day}.",
    ),
    "advice": (
        "Which {thing} would you recommend for a beginner?",
        "Does the {thing} come with batteries?",
        "Is the {thing} for {sum} better than the cheaper one?",
        "Will you have the {thing} in green again?",
        "What is the {thing} made of?",
        "How do I clean the {thing}?",
        "Does the {thing} fit somebody who is two metres tall?",
        "I am looking for a {thing} as a present for less than {sum}. What do you have?",
        "What is the difference between the two kinds of {thing} in your shop?",
        "Can I use the {thing} in the rain?",
    ),
}


def rows() -> list[tuple[str, str]]:
    """Distinct messages with their teams, as many of each, in an order of their own."""
    choose = random.Random(0)
    found: dict[str, str] = {}
    while len(found) < ROWS:
        team = sorted(TEAMS)[len(found) % len(TEAMS)]
        parts = {"thing": choose.choice(THINGS), "day": choose.choice(DAYS), "sum": choose.choice(SUMS)}
        found.setdefault(choose.choice(TEAMS[team]).format(**parts), team)
    table = list(found.items())
    choose.shuffle(table)
    return table


def main() -> None:
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("message", "team"), *rows()])


if __name__ == "__main__":
    main()
