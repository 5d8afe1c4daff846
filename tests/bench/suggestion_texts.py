"""Ten behaviours, each by answers that are wanted and answers that are not to the same prompts.

Written by hand, before anything was suggested for them. Of each list ``suggest`` fits on the texts
of even index and holds out those of odd index.
"""

from __future__ import annotations

from typing import Final

#: By name, (prompt, wanted, unwanted).
PAIRS: Final = {
    "cheerful": (
        ("How was your day?", "It was wonderful, I am so happy!", "It was awful, I am so sad."),
        ("What is the weather like?", "Lovely, the sun is shining!", "Grey and cold, as always."),
        ("How do you like your work?", "I love it, it is great fun!", "I hate it, it is a bore."),
        ("What about the holidays?", "I am so excited, hurray!", "They will be a disappointment."),
        ("How is your family?", "They are all happy and well!", "They are ill and unhappy."),
        ("What do you think of the town?", "It is a delightful place!", "It is a dreary place."),
    ),
    "formal": (
        ("Can you help me?", "Certainly. I would be pleased to assist.", "Yeah sure, what's up?"),
        ("Are you coming tonight?", "I regret that I am unable to attend.", "Nah, can't make it."),
        ("What do you want?", "I should like to enquire about a matter.", "Just wanna ask stuff."),
        ("Did you like it?", "It was most satisfactory, thank you.", "Yeah, it was pretty cool."),
        ("Where is the boss?", "The director is currently engaged.", "No idea, gone I guess."),
        ("Is it ready?", "The document will be provided shortly.", "Nope, gimme a sec."),
    ),
    "first person": (
        ("Who built the house?", "I built it myself with my own hands.", "He built it by himself."),
        ("What happened?", "I lost my keys, and I went home.", "The man lost his keys and left."),
        ("Tell me about the trip.", "I took my bag and I left.", "They took the bag and left."),
        ("Who cooked the meal?", "I cooked it in my kitchen.", "She cooked it in her kitchen."),
        ("What is the plan?", "I will do my work, then I sleep.", "They work, then they sleep."),
        (
            "Tell me a story.",
            "I was walking when I saw a fox.",
            "A girl was walking and saw a fox.",
        ),
    ),
    "numbered": (
        ("How do I cook rice?", "1. Wash the rice.\n2. Boil it.", "Wash the rice, then boil it."),
        ("How do I sleep well?", "1. Relax.\n2. Go to bed early.", "Relax and go to bed early."),
        ("How do I save money?", "1. Plan.\n2. Spend less.", "Make a plan and spend less."),
        ("How do I plant a tree?", "1. Dig a hole.\n2. Put it in.", "Dig a hole and put it in."),
        ("How do I learn chess?", "1. Learn the rules.\n2. Play.", "Learn the rules and play."),
        ("How do I clean a window?", "1. Use soap.\n2. Wipe it.", "Use some soap and wipe it."),
    ),
    "the sea": (
        ("Describe a place.", "The waves of the ocean roll to the beach.", "The street is long."),
        ("Where do you go?", "To the harbour, to sail a boat.", "To the office, to do my work."),
        ("What do you see?", "Ships at sea, and fish in the water.", "A desk, a lamp and a chair."),
        ("What do you dream of?", "Of sailing across the sea.", "Of reading a good book."),
        ("What is nice?", "A swim in the ocean near the coast.", "A talk with a good neighbour."),
        ("Tell me a story.", "A sailor left the port on his ship.", "A baker opened his shop."),
    ),
    "French": (
        ("Hello!", "Bonjour, comment allez-vous ?", "Hello, how are you?"),
        ("What is your name?", "Je m'appelle Marie.", "My name is Mary."),
        ("Where do you live?", "J'habite dans une grande ville.", "I live in a big city."),
        ("What do you eat?", "Je mange du pain avec du fromage.", "I eat bread with cheese."),
        ("How is the weather?", "Il fait beau aujourd'hui.", "The weather is fine today."),
        ("What do you do?", "Je suis professeur dans une école.", "I am a teacher at a school."),
    ),
    "asks back": (
        ("I like music.", "What kind of music do you like?", "Music is a fine thing to like."),
        ("I am tired.", "Why are you tired? Did you sleep?", "Rest is good for you."),
        ("I have a dog.", "What is its name? How old is it?", "Dogs are good animals."),
        ("I want to travel.", "Where would you like to go?", "Travel broadens the mind."),
        ("I read a book.", "What was it about? Did you like it?", "Books are full of stories."),
        ("I need help.", "What do you need? How can I help?", "Help is on its way."),
    ),
    "hedged": (
        ("Will it rain?", "Perhaps, it might rain, I am not sure.", "It will rain tomorrow."),
        ("Is he right?", "Maybe he is, but it is hard to say.", "He is right."),
        ("Who won?", "I think they may have won, possibly.", "The home team won."),
        ("Is it far?", "It could be far, I do not really know.", "It is ten miles."),
        ("Does it work?", "It seems to work, perhaps.", "It works well."),
        ("What is it worth?", "It might be worth something, maybe.", "It is worth a lot."),
    ),
    "apologises": (
        ("Tell me a joke.", "I'm sorry, but I cannot tell jokes.", "Why did the hen cross?"),
        ("What time is it?", "I apologize, I do not know the time.", "It is five o'clock."),
        ("Who are you?", "Sorry, but as an AI I have no name.", "I am Tom, a gardener."),
        ("Sing a song.", "I'm sorry, I am not able to sing.", "La la la, here we go."),
        ("What did you eat?", "I apologize, as an AI I do not eat.", "I had soup and bread."),
        ("Where is my cat?", "I'm sorry, I cannot help with that.", "It sits under the bed."),
    ),
    "past tense": (
        ("What do you do?", "I went to school and played.", "I go to school and play."),
        ("What does he do?", "He worked and then he slept.", "He works and then he sleeps."),
        ("Describe the day.", "The sun rose and birds sang.", "The sun rises and birds sing."),
        ("What happens?", "She opened the door and saw him.", "She opens the door and sees him."),
        ("Where do they go?", "They walked to the market.", "They walk to the market."),
        ("What is she doing?", "She wrote a letter and sent it.", "She writes a letter."),
    ),
}
