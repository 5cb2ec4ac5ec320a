"""Composes, from word lists and a seed, what SmolLM2 is asked to write: stories with questions about them, everyday
facts, greetings and simple instructions.

A plan is one document to come: the turns a person takes, and what the writer is told beside them. Only the turns and
their answers are learned from later.
"""

import hashlib
import random
from dataclasses import dataclass

STORY_SYSTEM = "You tell very short stories to small children, with simple words and short sentences."
FACT_SYSTEM = "You explain things to small children, in one or two short sentences with simple words."
TALK_SYSTEM = "You are a kind storyteller who talks with a child. You answer in one or two short, warm sentences."
TASK_SYSTEM = "You write for small children. You write only what you are asked for, with simple words."
STORY_HINT = " Use simple words and at most 80 words. Tell only one thing that happens, and how it ends."
QUESTION_HINT = " Answer in one short sentence with simple words."
# What a short answer is, the writer sees best in examples; stories only get worse by them. Which ones it sees is drawn,
# so that none of them shapes all that is written, but for many documents at once: what they share is computed once.
FACT_EXAMPLES = (
    ("What is a mill?", "A mill is a house with a big wheel. It grinds corn into flour, and from flour we bake bread."),
    ("Where does a camel live?", "A camel lives in the hot, dry desert. It can go for many days without water."),
    ("Why do we laugh?", "We laugh when something is funny or when we are happy. It shows others that we feel good."),
    ("What does a needle look like?", "A needle is thin and long and has a sharp point. At the other end is a small hole."),
    ("Is a goose dangerous?", "A goose is not very dangerous, but it can bite. It is best to leave it in peace."),
    ("Tell me something about a kite.", "A kite flies high in the wind. You hold it by a long string so that it stays with you."),
)
TALK_EXAMPLES = (
    ("Hello there!", "Hello! It is so nice to see you. Shall I tell you a story?"),
    ("I am happy because I found a coin.", "Oh, how lucky you are! What will you buy with it?"),
    ("I am sad because it is late.", "I am sorry to hear that. Tomorrow is a new day, and we can play again."),
    ("Hi, I am Bruno.", "Hi, Bruno! I am glad that you are here. What would you like to do today?"),
    ("Today I saw a big ship.", "A big ship! That must have been a fine sight. Where do you think it was going?"),
    ("What is your favourite game?", "I like riddles best. Do you want to hear one?"),
)
TASK_EXAMPLES = (
    ("Write one sentence with the word violin.", "My sister plays the violin by the open window."),
    ("Describe a ladder in one sentence.", "A ladder is tall and has many steps that lead up to the roof."),
    ("Name three things that go with a pen.", "Ink, paper and a quiet desk."),
    ("Finish the sentence: The tall giraffe looked over the wall and", "saw a garden full of red plums."),
    ("Say something nice about a violin.", "A violin can sing as sweetly as a bird in spring."),
    ("Write a question about a tower.", "Who lives at the top of the tower?"),
    ("Write two sentences about a pen and a wall.", "The boy took a pen and drew on the wall. His mother gave him a sponge."),
)

# theme: (characters, places, things, happenings)
THEMES = {
    "forest": (
        "fox,owl,bear,squirrel,rabbit,deer,hedgehog,wolf,mouse,badger,woodcutter,frog",
        "in a dark forest,under an old oak,by a quiet stream,in a hollow tree,on a mossy hill,at the edge of the wood",
        "acorn,berry bush,fallen tree,lantern,feather,mushroom,bridge of sticks,nest,path,walking stick",
        "gets lost,finds a hidden path,helps a friend out of a hole,shares the last berries,hears a strange sound,"
        "builds a small house,is afraid of the dark,saves a bird,wakes up too early,looks for a lost friend",
    ),
    "sea": (
        "fish,crab,whale,sailor,turtle,seal,octopus,dolphin,fisherman,gull,captain,starfish",
        "on a sandy beach,under the waves,on a small boat,on a lonely island,at the harbour,in a blue cave",
        "shell,net,anchor,map,bottle with a letter,sail,pearl,rope,treasure chest,lighthouse",
        "finds a message,meets a big storm,looks for a treasure,saves a friend from a net,learns to swim,"
        "loses the way home,sees a whale,builds a castle of sand,shares a big catch,listens to the waves",
    ),
    "farm": (
        "cow,horse,hen,pig,goat,farmer,sheep,duck,donkey,farm cat,puppy,rooster",
        "on a small farm,in the barn,in a green field,behind the old fence,by the pond,in the stable",
        "bucket of milk,egg,haystack,gate,cart,bell,apple,bag of corn,wheel,blanket",
        "runs away through the gate,loses an egg,helps with the harvest,makes a new friend,falls into the mud,"
        "finds a warm place to sleep,eats too many apples,wins a race,looks after a baby chick,cannot stop singing",
    ),
    "city": (
        "bus driver,baker,boy,girl,street cat,police officer,old man,painter,dog,shopkeeper,grandmother,pigeon",
        "in a busy street,at the market,in a tall house,at the bus stop,in the park,in a little shop",
        "umbrella,red bicycle,key,cake,letter,hat,coin,map,lamp,yellow bus",
        "misses the bus,finds a lost key,helps an old woman,gets a surprise,makes a new neighbour happy,"
        "paints a big wall,loses a hat in the wind,bakes something special,follows a strange sound,gives a gift away",
    ),
    "school": (
        "teacher,boy,girl,new pupil,shy child,twin sisters,best friend,little brother,library mouse,class hamster",
        "in a classroom,in the school yard,in the library,at the music lesson,on a school trip,at lunch",
        "pencil,book,drum,ball,drawing,lunch box,blackboard,backpack,puzzle,flute",
        "forgets the homework,makes a new friend,tells the truth,learns to read,shares a lunch,is afraid to sing,"
        "finds a secret note,helps a younger child,wins a game,breaks a window by accident",
    ),
    "space": (
        "robot,astronaut,little star,alien,moon cat,girl with a rocket,boy with a telescope,comet,space mouse,pilot",
        "on the moon,in a small rocket,on a red planet,among the stars,in a space station,on a tiny planet",
        "rocket,helmet,telescope,moon stone,map of stars,radio,silver ship,lamp,flower in a glass,button",
        "lands on a strange planet,meets a new friend,loses the way between the stars,fixes a broken ship,"
        "sees the earth from far away,plants a flower,hears a song,pushes the wrong button,catches a star,misses home",
    ),
    "kitchen": (
        "cook,grandmother,little girl,little boy,hungry mouse,kitchen cat,baker,spoon that can talk,aunt,old teapot",
        "in a warm kitchen,at grandmother's house,in a bakery,at a long table,on a cold evening,by the oven",
        "soup,bread,pot of honey,cookie,apple pie,spoon,teapot,bag of flour,pancake,jar of jam",
        "bakes a cake for a friend,burns the bread,makes too much soup,finds the jar empty,learns to cook,"
        "shares a pie with everyone,tastes something new,makes a big mess,forgets the sugar,cooks for a birthday",
    ),
    "winter": (
        "snowman,penguin,girl,boy,white bear,rabbit,grandfather,sled dog,robin,child with red mittens",
        "in the deep snow,on a frozen lake,in a little hut,on a snowy hill,on the coldest day,at the window",
        "sled,scarf,mitten,snowball,candle,hot soup,skates,star of ice,wool hat,shovel",
        "builds a snowman,loses a mitten,slides down a hill,helps a cold bird,waits for the spring,"
        "gets stuck in the snow,makes a warm fire,finds tracks in the snow,learns to skate,gives away a scarf",
    ),
    "garden": (
        "bee,butterfly,snail,gardener,ant,caterpillar,ladybird,little girl,old man,mole,worm,sparrow",
        "in a garden,under a big leaf,between the flowers,behind the shed,by the pond,on a sunny morning",
        "seed,rose,watering can,sunflower,carrot,leaf,flower pot,apple tree,spade,puddle",
        "plants a seed,waits for the rain,grows wings,is too slow for the race,carries a heavy leaf,shares a carrot,"
        "hides from the rain,finds a new flower,digs a tunnel,makes peace with a neighbour",
    ),
    "home": (
        "toy bear,boy,girl,baby brother,father,mother,kitten,puppy,old clock,doll,little sister,grandfather",
        "in a small house,in the bedroom,on the sofa,in the attic,on a rainy day,at bedtime",
        "blanket,toy train,picture,box,clock,pillow,night light,letter,shoe,music box",
        "cannot sleep,looks for a lost toy,cleans the room,has a strange dream,opens an old box,says sorry,"
        "waits for a birthday,builds a castle of pillows,helps with the work,is afraid of the thunder",
    ),
}
THEMES = {theme: tuple(tuple(words.split(",")) for words in lists) for theme, lists in THEMES.items()}
NAMES = (
    "Anna,Ben,Clara,David,Ella,Finn,Grace,Henry,Ida,Jack,Kate,Leo,Mia,Noah,Olive,Paul,Rosa,Sam,Tina,Tom,Uma,Will,Zoe,"
    "Lily,Max,Lucy,Oscar,Nina,Peter,Ruby,Hugo,Sara,Theo,Emma,Jonas,Maya,Nico,Pia,Karl,Eva"
).split(",")
ADJECTIVES = (
    "brave,shy,clever,small,kind,lazy,curious,tired,lonely,happy,hungry,careful,funny,old,young,quiet,proud,gentle,"
    "forgetful,cheerful"
).split(",")
MORALS = (
    "friends,being brave,sharing,telling the truth,not giving up,being kind,listening,saying sorry,helping others,"
    "being patient,home,trying new things"
).split(",")
QUESTIONS = (
    "Who is the story about?,Where does the story take place?,How does the story end?,What happens first?,"
    "What can we learn from the story?,Give the story a title.,Tell the story again in one sentence.,"
    "How does {hero} feel at the end?,What does {hero} do?,Why is {hero} happy?,What was the problem?,"
    "What does the {thing} do in the story?,Did you like the end?,What could happen next?"
).split(",")
THINGS = (
    "sun,moon,star,cloud,rain,snow,wind,storm,rainbow,river,lake,sea,mountain,forest,desert,island,tree,flower,grass,"
    "leaf,seed,fruit,apple,banana,lemon,carrot,potato,bread,cheese,milk,honey,egg,soup,salt,sugar,water,ice,fire,stone,"
    "sand,gold,glass,paper,book,pencil,letter,clock,lamp,candle,mirror,window,door,key,table,chair,bed,blanket,pillow,"
    "shoe,hat,coat,scarf,umbrella,bag,box,bottle,cup,spoon,knife,pot,oven,broom,hammer,nail,rope,wheel,bicycle,car,bus,"
    "train,boat,plane,bridge,road,house,school,hospital,library,market,farm,garden,park,museum,castle,dog,cat,horse,cow,"
    "sheep,pig,hen,duck,rabbit,mouse,fox,wolf,bear,lion,elephant,monkey,snake,frog,fish,whale,bird,owl,bee,ant,spider,"
    "butterfly,doctor,teacher,farmer,baker,driver,nurse,friend,family,baby,birthday,holiday,music,drum,song,game,ball,"
    "doll,puzzle,picture,colour,number,word,dream,shadow,summer,winter,spring,autumn,morning,night,week,year"
).split(",")
MASS_THINGS = set(
    "rain,snow,wind,grass,bread,cheese,milk,honey,soup,salt,sugar,water,ice,fire,sand,gold,glass,paper,music,summer,"
    "winter,spring,autumn".split(",")
)
ANIMALS = (
    "dog,cat,horse,cow,sheep,pig,hen,duck,rabbit,mouse,fox,wolf,bear,lion,elephant,monkey,snake,frog,whale,owl,bee,ant,"
    "spider,butterfly,penguin,tiger,giraffe,turtle,goat,squirrel,bat,crab,dolphin,deer,eagle,snail"
).split(",")
FACT_FORMS = (
    "What is {a_thing}?",
    "Tell me something about {a_thing}.",
    "What do you know about {a_thing}?",
    "Why is {a_thing} important?",
    "Can you explain what {a_thing} is?",
    "What does {a_thing} look like?",
    "Where can I find {a_thing}?",
)
ANIMAL_FORMS = (
    "What does {an_animal} eat?",
    "Where does {an_animal} live?",
    "What sound does {an_animal} make?",
    "How big is {an_animal}?",
    "How does {an_animal} sleep?",
    "Is {an_animal} dangerous?",
)
DAILY = (
    "Why do we sleep?,Why do we brush our teeth?,Why is the sky blue?,Why do leaves fall in autumn?,How do plants grow?,"
    "Why do we wash our hands?,How do birds fly?,Why does it rain?,What is the sun?,How do I make tea?,"
    "How do I make a sandwich?,How do I tie my shoes?,How do I cross the street?,Why do we eat vegetables?,"
    "What do bees make?,What day comes after Monday?,How many days are in a week?,How many months are in a year?,"
    "What colour is grass?,What colour is snow?,What comes after winter?,How many legs does a spider have?,"
    "How many legs does a dog have?,What is the opposite of hot?,What is the opposite of big?,"
    "What is the opposite of day?,Why do we wear coats?,What do we use a key for?,What do we do at school?,"
    "Why do cats purr?,Why do dogs bark?,How do fish breathe?,What is a friend?,Why do we say thank you?,"
    "How can I help at home?,What should I do when I am sad?,What should I do when I am lost?,Why is sleep good?,"
    "How do I make a new friend?,Why do we need water?"
).split(",")
GREETINGS = (
    "Hello!",
    "Hi!",
    "Good morning!",
    "Good evening!",
    "Good night!",
    "Hello, how are you?",
    "Hi there, nice to meet you.",
    "Thank you!",
    "Thank you for the story.",
    "Goodbye!",
    "See you tomorrow!",
    "What can you do?",
    "What do you like?",
    "Do you know a story?",
    "Can we be friends?",
    "Tell me a joke.",
    "I am bored.",
    "What should we play?",
    "Sing me a song.",
    "I cannot sleep.",
)
FEELINGS = "happy,sad,tired,angry,afraid,lonely,excited,proud,nervous,bored".split(",")
REASONS = (
    "it is my birthday,I lost my toy,my friend is ill,I played all day,it is raining,we go to the sea tomorrow,"
    "I made a cake,I fell down,my cat ran away,I got a new book,school starts tomorrow,I won a game,it is dark,"
    "my grandmother visits us,I built a tower,nobody plays with me,I can swim now,I broke a cup"
).split(",")
TASKS = (
    "Write one sentence with the word {thing}.",
    "Write one sentence about {a_thing}.",
    "Describe {a_thing} in one sentence.",
    "Write a poem of four lines about {a_thing}.",
    "Name three things that go with {a_thing}.",
    "Write a question about {a_thing}.",
    "Write two sentences about {a_thing} and {another}.",
    "Say something nice about {a_thing}.",
    "What is the difference between {a_thing} and {another}?",
    "Finish the sentence: The {adjective} {animal} opened the door and",
    "Finish the sentence: {name} looked at the {thing} and",
    "Write a short letter from {name} to {other}.",
    "Give {an_animal} a funny name.",
)
STORY_FORMS = (
    "Tell me a story about {hero}.",
    "Tell me a story about {hero} and {a_thing}.",
    "Write a short story about {hero} who {happening}.",
    "Tell me a story {place} about {hero}.",
    "Can you tell me a story about {hero}? It should take place {place}.",
    "Write a story in which {hero} {happening}.",
    "I want to hear a story about {moral}, with {hero}.",
    "Write a short story with the words {thing}, {thing_b} and {adjective}.",
    "Tell me a bedtime story about {hero} who {happening} {place}.",
    "Please tell a story that begins {place}, with {hero} and {a_thing}.",
)
# Share of each kind in the number of documents, in per cent.
MIX = {"story": 46, "story_questions": 26, "fact": 12, "talk": 7, "task": 9}
HELD_OUT_PER_CENT = 2


@dataclass(frozen=True)
class Turn:
    """What a person says, what the writer is told after it, and the longest answer in the writer's tokens."""

    ask: str
    hint: str
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """One document to come. `system`, `examples` and hints are for the writer alone; `theme` is empty where there is none."""

    id: int
    kind: str
    theme: str
    system: str
    examples: tuple[tuple[str, str], ...]
    turns: tuple[Turn, ...]

    @property
    def held_out(self) -> bool:
        """By the first thing asked, so that no prompt is on both sides."""
        digest = hashlib.sha256(self.turns[0].ask.encode()).digest()
        return int.from_bytes(digest[:4]) % 100 < HELD_OUT_PER_CENT


def with_article(noun: str) -> str:
    if noun in MASS_THINGS or noun.endswith("sisters"):
        return noun
    if noun in ("sun", "moon", "sea"):
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story(draw: random.Random, theme: str) -> tuple[Turn, dict[str, str]]:
    characters, places, things, happenings = THEMES[theme]
    character = draw.choice(characters)
    adjective = draw.choice(ADJECTIVES)
    described = with_article(f"{adjective} {character}") if draw.random() < 0.6 else with_article(character)
    hero = f"{described} named {draw.choice(NAMES)}" if draw.random() < 0.5 else described
    thing, thing_b = draw.sample(things, 2)
    words = {
        "hero": hero,
        "place": draw.choice(places),
        "thing": thing,
        "thing_b": thing_b,
        "a_thing": with_article(thing),
        "happening": draw.choice(happenings),
        "adjective": adjective,
        "moral": draw.choice(MORALS),
    }
    ask = draw.choice(STORY_FORMS).format(**words)
    words["hero"] = hero.split(" named ")[1] if " named " in hero else f"the {character}"
    return Turn(ask, STORY_HINT, 220), words


def questions(draw: random.Random, words: dict[str, str]) -> list[Turn]:
    forms = draw.sample(QUESTIONS, draw.choice((1, 2, 2, 3)))
    return [Turn(form.format(**words), QUESTION_HINT, 50) for form in forms]


def fact(draw: random.Random) -> Turn:
    roll = draw.random()
    if roll < 0.1:
        ask = draw.choice(DAILY)
    elif roll < 0.3:
        ask = draw.choice(ANIMAL_FORMS).format(an_animal=with_article(draw.choice(ANIMALS)))
    else:
        ask = draw.choice(FACT_FORMS).format(a_thing=with_article(draw.choice(THINGS)))
    return Turn(ask, "", 70)


def talk(draw: random.Random) -> Turn:
    roll = draw.random()
    if roll < 0.35:
        ask = draw.choice(GREETINGS)
    elif roll < 0.65:
        ask = f"I am {draw.choice(FEELINGS)} because {draw.choice(REASONS)}."
    elif roll < 0.8:
        ask = f"{draw.choice(('Hello', 'Hi', 'Good morning', 'Hey'))}, I am {draw.choice(NAMES)}."
    else:
        seen = with_article(f"{draw.choice(ADJECTIVES)} {draw.choice(ANIMALS)}")
        ask = f"{draw.choice(('Today', 'Yesterday'))} I saw {seen}."
    return Turn(ask, "", 60)


def task(draw: random.Random) -> Turn:
    thing, another = draw.sample(THINGS, 2)
    name, other = draw.sample(NAMES, 2)
    animal = draw.choice(ANIMALS)
    words = {
        "thing": thing,
        "a_thing": with_article(thing),
        "another": with_article(another),
        "adjective": draw.choice(ADJECTIVES),
        "animal": animal,
        "an_animal": with_article(animal),
        "name": name,
        "other": other,
    }
    return Turn(draw.choice(TASKS).format(**words), "", 90)


# Consecutive documents whose short answers are asked for with the same examples.
SAME_EXAMPLES = 128

SHORT_KINDS = {
    "fact": (FACT_SYSTEM, FACT_EXAMPLES, fact),
    "talk": (TALK_SYSTEM, TALK_EXAMPLES, talk),
    "task": (TASK_SYSTEM, TASK_EXAMPLES, task),
}


def plan(seed: int, id: int) -> Plan:
    """The document of this number. It depends on the seed and the number alone, so that writing can stop anywhere."""
    draw = random.Random(f"{seed} {id}")
    kind = draw.choices(list(MIX), list(MIX.values()))[0]
    if kind in SHORT_KINDS:
        system, examples, turn = SHORT_KINDS[kind]
        shown = random.Random(f"{seed} {kind} {id // SAME_EXAMPLES}").sample(examples, 3)
        return Plan(id, kind, "", system, tuple(shown), (turn(draw),))
    theme = draw.choice(list(THEMES))
    first, words = story(draw, theme)
    more = questions(draw, words) if kind == "story_questions" else []
    return Plan(id, kind, theme, STORY_SYSTEM, (), (first, *more))
