"""Topics that features of the small dictionaries are looked for by, with tests of the answers.

Fixed before anything was generated with them. The texts are for `contrast` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Topic:
    """Something that a text is about.

    Attributes:
        name: in a word.
        test: a regular expression, for capitals and small letters alike.
        texts: about it.
    """

    name: str
    test: str
    texts: tuple[str, ...]

    def shown_in(self, answer: str) -> bool:
        """Whether an answer is about it: two matches or more."""
        return len(re.findall(self.test, answer, re.IGNORECASE)) >= 2


TOPICS: Final = (
    Topic(
        "music",
        r"\b(music\w*|songs?|sing\w*|guitars?|pianos?|melod\w+|bands?|concerts?|orchestra\w*)\b",
        (
            "The orchestra played the second movement slowly, and the violins were out of tune.",
            "She learned the piano as a child and writes her own songs for the guitar.",
            "The band released a new album, and the concert was sold out within an hour.",
            "He hummed a melody that he had heard the choir sing on Sunday.",
        ),
    ),
    Topic(
        "sea",
        r"\b(seas?|ships?|boats?|sail\w*|oceans?|waves?|captain\w*|harbou?rs?|fish\w*|beach\w*)\b",
        (
            "The ship left the harbour at dawn and sailed north along the coast.",
            "Waves broke over the deck while the captain held the wheel.",
            "The fishermen pulled their boats onto the beach before the storm.",
            "From the lighthouse you could see the whole ocean and a dozen sails.",
        ),
    ),
    Topic(
        "medicine",
        r"\b(doctors?|hospitals?|medic\w+|patients?|diseases?|treat\w+|nurses?|surg\w+|health\w*)\b",
        (
            "The doctor examined the patient and ordered a blood test.",
            "She was taken to the hospital with a fever and treated with antibiotics.",
            "The nurse gave him the medicine twice a day until the infection was gone.",
            "Surgery was not needed, since the disease had been found early.",
        ),
    ),
    Topic(
        "war",
        r"\b(wars?|soldiers?|arm(?:y|ies)|battles?|troops?|weapons?|milita\w+|enem\w+|fight\w*)\b",
        (
            "The army crossed the river at night and attacked the fort.",
            "Hundreds of soldiers died in the battle, and the enemy took the town.",
            "The general sent more troops to the front and asked for ammunition.",
            "After the war the soldiers returned home and laid down their weapons.",
        ),
    ),
    Topic(
        "food",
        r"\b(foods?|eat\w*|cook\w*|meals?|dinners?|breads?|soups?|restaurants?|delicious|recipes?)\b",
        (
            "Fry the onions in butter, add the meat and cook it for an hour.",
            "The restaurant served a thick soup with fresh bread and cheese.",
            "For dinner they ate roast chicken, potatoes and a salad.",
            "The recipe asks for two eggs, sugar and a cup of flour.",
        ),
    ),
    Topic(
        "money",
        r"\b(money|banks?|prices?|markets?|stocks?|financ\w+|invest\w*|econom\w+|compan\w+|trad\w+)\b",
        (
            "The bank lowered its interest rate, and stock prices rose.",
            "The company reported a profit of ten million dollars this quarter.",
            "Investors sold their shares when the market opened on Monday.",
            "He could not pay the loan and owed money to three banks.",
        ),
    ),
    Topic(
        "religion",
        r"\b(god|lord|pray\w*|church\w*|faith\w*|holy|jesus|christ\w*|bible|spirit\w*|religio\w+)\b",
        (
            "The priest read from the Bible and the people prayed.",
            "God created the heavens and the earth, says the first book.",
            "They went to church every Sunday and sang hymns of faith.",
            "The prophet told them to worship one Lord and to give to the poor.",
        ),
    ),
)
