"""What the model is asked where the effect of steering is measured, and the behaviours looked for.

Fixed before anything was generated with them. Features are chosen on one set of prompts and
reported on another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

SELECTION: Final = (
    "Tell me about your weekend.",
    "Write a short paragraph about anything you like.",
    "What should I do this evening?",
    "Describe a person you admire.",
    "Give me some advice.",
    "What is on your mind?",
    "Tell me a story.",
    "What is important in life?",
)
REPORT: Final = (
    "Tell me about your day.",
    "What did you do yesterday?",
    "Tell me something interesting.",
    "Describe the room you are in.",
    "Write the beginning of a story.",
    "What are your plans for the summer?",
    "Say something to cheer me up.",
    "What do you think about most often?",
    "Describe a good friend.",
    "What have you learned recently?",
    "Write a few sentences about the future.",
    "What would you change in the world?",
)


@dataclass(frozen=True)
class Behaviour:
    """Something that the model does unasked.

    Attributes:
        name: in a few words.
        test: a regular expression; an answer that it matches anywhere shows the behaviour.
        contrast: prompts on whose answers its features are found.
        held_out: prompts on which their suppression is measured.
    """

    name: str
    test: str
    contrast: tuple[str, ...]
    held_out: tuple[str, ...]

    def shown_in(self, answer: str) -> bool:
        """Whether an answer shows it."""
        return self._search(answer) is not None

    def found_in(self, answer: str) -> re.Match[str]:
        """Where an answer that shows it does so first."""
        found = self._search(answer)
        assert found is not None
        return found

    def _search(self, answer: str) -> re.Match[str] | None:
        return re.search(self.test, answer, re.IGNORECASE | re.MULTILINE)


_PERSONAL: Final = (
    "Tell me about your weekend.",
    "How are you feeling today?",
    "Describe the place where you live.",
    "What did you dream about last night?",
    "Tell me something about yourself.",
    "What are you afraid of?",
    "Where did you grow up?",
    "What will you do tomorrow?",
    "Describe your morning.",
    "What do you do for a living?",
    "Tell me about your family.",
    "What do you like to eat?",
    "Do you have any friends?",
    "What is your favourite book?",
    "Tell me about your holidays.",
    "Who are you?",
)
_PERSONAL_HELD_OUT: Final = (
    "Tell me about your day.",
    "What did you do yesterday?",
    "Describe your home.",
    "What makes you laugh?",
    "Tell me about your childhood.",
    "What do you do in the evening?",
    "Tell me about your best friend.",
    "What is your biggest wish?",
    "Describe yourself.",
    "How was your week?",
    "What is your favourite place?",
    "Tell me about your work.",
    "What did you have for breakfast?",
    "Tell me a secret.",
    "What is your name?",
    "Do you have a pet?",
)

BEHAVIOURS: Final = (
    Behaviour(
        "numbered lists",
        r"^\s*1\. ",
        (
            "How can I sleep better?",
            "How can I save money?",
            "How do I prepare for an exam?",
            "How do I fix a flat tyre?",
            "How can I improve my writing?",
            "How do I clean a window?",
            "How do I learn to swim?",
            "How do I bake bread?",
            "How do I choose a bicycle?",
            "How can I make new friends?",
            "How do I plant a tree?",
            "What should I do on a rainy day?",
            "How do I make a good cup of tea?",
            "How can I learn to draw?",
            "How do I paint a wall?",
            "How can I stay healthy?",
        ),
        (
            "How do I learn French?",
            "How can I wake up earlier?",
            "How do I move to another city?",
            "How can I get better at chess?",
            "How do I wash a wool sweater?",
            "How do I start a garden?",
            "How can I read more books?",
            "How do I train a dog?",
            "How can I be on time?",
            "How do I repair a chair?",
            "How do I plan a party?",
            "How can I run faster?",
            "How do I cook rice?",
            "How can I sell my car?",
            "How do I find a job?",
            "How can I remember names?",
        ),
    ),
    Behaviour(
        "code blocks",
        r"```|^\s*(def|import|for|print)\b",
        (
            "How do I sort a list?",
            "How do I reverse a string?",
            "What is a loop?",
            "How do I read a file?",
            "How can I count the words of a text?",
            "How do I find the largest number?",
            "What is recursion?",
            "How do I compute an average?",
            "How do I remove duplicates?",
            "What is a dictionary in Python?",
            "How do I test whether a number is prime?",
            "What does a function do?",
            "How do I split a sentence into words?",
            "How do I add two numbers?",
            "What is a class in programming?",
            "How do I round a number?",
        ),
        (
            "How do I join two lists?",
            "How do I count from one to ten?",
            "What is a variable?",
            "How do I write to a file?",
            "How do I find the smallest number?",
            "How do I replace a word in a text?",
            "What is an array?",
            "How do I compute a factorial?",
            "How do I tell whether a year is a leap year?",
            "What is a string in Python?",
            "How do I multiply two matrices?",
            "How do I convert a string to a number?",
            "What is a set in Python?",
            "How do I stop a loop?",
            "How do I sum the digits of a number?",
            "How do I print a table?",
        ),
    ),
    Behaviour(
        '"I hope this message finds you well"',
        r"\bhope (this|that|my|you)\b[^.\n]*\b(well|finds?)\b",
        (
            "Write an e-mail to my boss.",
            "Write an e-mail to my landlord.",
            "Write a letter to my aunt.",
            "Write a message to my team.",
            "Write a note to my neighbour.",
            "Write a letter to the mayor.",
            "Write an e-mail to a colleague.",
            "Write a letter to an old friend.",
            "Write an e-mail to my bank.",
            "Write a message to my dentist.",
            "Write a letter to a newspaper.",
            "Write an e-mail to a hotel.",
            "Write a note to my sister.",
            "Write a letter to my grandfather.",
            "Write an e-mail to my students.",
            "Write a message to a customer.",
        ),
        (
            "Write an e-mail to my teacher.",
            "Write a letter to my cousin.",
            "Write an e-mail to a shop.",
            "Write a message to my doctor.",
            "Write a letter to my uncle.",
            "Write an e-mail to the library.",
            "Write a note to my roommate.",
            "Write a letter to my lawyer.",
            "Write an e-mail to my professor.",
            "Write a message to my coach.",
            "Write a letter to a museum.",
            "Write an e-mail to an airline.",
            "Write a letter to my son.",
            "Write an e-mail to a client.",
            "Write a message to my manager.",
            "Write a letter to a stranger.",
        ),
    ),
    Behaviour(
        "speaking as an assistant",
        r"\b(an AI|AI (language|assistant|model)|language model|chatbot|digital assistant|"
        r"I'm sorry|I apologi[sz]e|happy to (assist|help)|here to (assist|help)|"
        r"personal (preferences|experiences|feelings|opinions))\b",
        _PERSONAL,
        _PERSONAL_HELD_OUT,
    ),
    Behaviour(
        "fantasy",
        r"\b(magic\w*|mystic\w*|el(f|ves|ven|fin)|dwar(f|ves)|wizards?|witch\w*|enchant\w*|"
        r"mythical|kingdoms?|dragons?|creatures?|fair(y|ies)|spirits?|realms?|"
        r"ethereal|curse[ds]?|sorcer\w*)\b",
        (
            "Tell me a story about a forest.",
            "Tell me a bedtime story.",
            "Write a story about an old house.",
            "Write a short story about a river.",
            "Tell me a story about a lost ring.",
            "Write a story about two sisters.",
            "Tell me a story about a mountain.",
            "Write a tale about a shoemaker.",
            "Tell me a story about a cat.",
            "Write a story about a long journey.",
            "Tell me a story about a garden.",
            "Write a story about a stranger.",
            "Tell me a story about a lake.",
            "Write a story about a night in winter.",
            "Tell me a story about a secret door.",
            "Write a short story about a bird.",
        ),
        (
            "Tell me a story about an island.",
            "Write a story about a castle.",
            "Tell me a story about a little girl.",
            "Write a short story about a tree.",
            "Tell me a story about a key.",
            "Write a story about a fisherman.",
            "Tell me a story about a village.",
            "Write a tale about a baker.",
            "Tell me a story about a horse.",
            "Write a story about a dream.",
            "Tell me a story about a bridge.",
            "Write a story about an old woman.",
            "Tell me a story about the moon.",
            "Write a story about a storm.",
            "Tell me a story about a book.",
            "Write a short story about a wolf.",
        ),
    ),
)
