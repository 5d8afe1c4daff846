"""What is asked where a style is to be put on only under a condition, by topic.

Fixed before anything was generated with them. Conditions are found on the first half of each list
and reported on the second.
"""

from __future__ import annotations

from typing import Final

TOPICS: Final = {
    "food": (
        "What should I cook for dinner tonight?",
        "How do I make a good soup?",
        "What is a healthy breakfast?",
        "Describe your favourite dessert.",
        "Which cheese goes well with bread?",
        "How long do I boil an egg?",
        "What do people eat in Italy?",
        "Recommend a dish with potatoes.",
        "What can I bake with apples?",
        "How do I season a salad?",
        "What should I drink with my lunch?",
        "Describe a meal at a restaurant.",
        "Which vegetables are good in a stew?",
        "How do I fry fish?",
        "What do people eat in Japan?",
        "Recommend a snack for the afternoon.",
    ),
    "medicine": (
        "Why does my doctor want a blood test?",
        "What does a nurse do in a hospital?",
        "How is a broken arm treated?",
        "What are the symptoms of the flu?",
        "When should a patient see a surgeon?",
        "How do vaccines work?",
        "What is a good treatment for a headache?",
        "Describe a visit to the clinic.",
        "What does a doctor do in the emergency room?",
        "How is a fever treated?",
        "Why do patients need physical therapy?",
        "What are the symptoms of diabetes?",
        "When is surgery necessary?",
        "How do antibiotics work?",
        "What medicine helps against a cough?",
        "Describe a day in a hospital.",
    ),
    "computers": (
        "How do I install a program on my computer?",
        "What is an operating system?",
        "Why is my laptop so slow?",
        "How do I set up a website?",
        "What does a software engineer do?",
        "Which programming language should I learn?",
        "How do I back up my files?",
        "What is a computer network?",
        "How do I update the software on my laptop?",
        "What is a database?",
        "Why does my computer crash?",
        "How do I protect my password?",
        "What does a web developer do?",
        "Which keyboard is good for programming?",
        "How do I delete a file?",
        "What is a server?",
    ),
    "other": (
        "What should I do this evening?",
        "Describe a person you admire.",
        "How do I learn to swim?",
        "Tell me about the weather in spring.",
        "What is a good present for a child?",
        "Write a few sentences about a river.",
        "How can I make new friends?",
        "What did people do a hundred years ago?",
        "Describe the room you are in.",
        "Tell me something about horses.",
        "How do I fix a bicycle?",
        "What would you change in the world?",
        "Write a few sentences about winter.",
        "How can I be on time?",
        "Describe a good teacher.",
        "What is a nice place to visit?",
    ),
}
