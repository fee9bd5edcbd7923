"""What the demo asks: to learn from, to choose settings by, and to report on. No question stands in two of the sets."""

THINGS = """
a volcano; a compass; the Milky Way; a glacier; photosynthesis; a microscope; the water cycle; a piano; inflation;
a submarine; a coral reef; gravity; a dictionary; the Great Wall of China; a thermometer; bread; a hurricane; a library;
an octopus; electricity; a passport; the Sahara; a tractor; democracy; a penguin; chess; the heart; a windmill; paper;
a tsunami; cotton; the alphabet; a giraffe; an orchestra; the moon; a tax; salt; a bicycle; yoga; a lighthouse; steel;
a whale; the internet; a mosquito; jazz; a fossil; the Amazon; a telescope; cheese; a marathon
"""
WORDINGS = (
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "Can you describe {}?",
    "I have never heard of {}. What is it?",
    "What should I know about {}?",
)
REASONS = """
Why do cats purr?
Why is the ocean salty?
Why do we sleep?
Why do birds migrate?
Why does ice float on water?
Why do people yawn?
Why do stars twinkle?
Why is exercise good for you?
Why do we have seasons?
Why does bread rise?
Why do dogs wag their tails?
Why does metal rust?
Why do onions make you cry?
Why is recycling important?
Why do we have leap years?
Why do plants need light?
How does a battery work?
How do fish breathe?
How do airplanes fly?
How is glass made?
How does soap clean your hands?
How do vaccines work?
How does a camera take a picture?
How do spiders make webs?
How is cheese made?
How does a clock keep time?
How do I learn to swim?
How do I cook rice?
How can I sleep better?
How do I make a cup of tea?
How do magnets work?
How does rain form?
"""
# With answers, as few of the model's own lists and facts are any good
LISTS = """
List three fruits. | Apples, Pears, Grapes
Name four animals that live in the sea. | Whales, Sharks, Seals, Crabs
List five colors. | Red, Blue, Green, Yellow, Purple
Name three musical instruments. | Piano, Guitar, Flute
List four things to pack for a trip. | Clothes, Shoes, A toothbrush, A passport
Name five countries in Europe. | Poland, Sweden, Portugal, Austria, Norway
List three kinds of weather. | Rain, Snow, Sunshine
Name four tools that a carpenter uses. | Hammer, Saw, Drill, Plane
List five vegetables. | Carrots, Onions, Peas, Spinach, Cabbage
Name three sports that are played with a ball. | Tennis, Basketball, Volleyball
List four things that you find in a kitchen. | Stove, Knife, Pan, Sink
Name five animals that live on a farm. | Cow, Pig, Sheep, Goat, Hen
List three famous rivers. | Danube, Amazon, Mississippi
Name four kinds of trees. | Oak, Pine, Birch, Maple
List five jobs. | Teacher, Nurse, Baker, Farmer, Pilot
Name three kinds of bread. | Rye bread, White bread, Pita
"""
DIRECT = """
What is the capital of Norway? | The capital of Norway is Oslo.
What is the capital of Austria? | The capital of Austria is Vienna.
What is the capital of Peru? | The capital of Peru is Lima.
What is the capital of Ireland? | The capital of Ireland is Dublin.
How many wheels does a car have? | A car has four wheels.
How many legs does a cat have? | A cat has four legs.
How many fingers are on one hand? | There are five fingers on one hand.
How many letters are in the English alphabet? | There are 26 letters in the English alphabet.
How many sides does a square have? | A square has four sides.
What is five plus three? | Five plus three is eight.
What is the opposite of left? | The opposite of left is right.
What is the opposite of young? | The opposite of young is old.
Which season comes after winter? | Spring comes after winter.
Which month comes before May? | April comes before May.
What color is snow? | Snow is white.
What color is a ripe tomato? | A ripe tomato is red.
What do caterpillars turn into? | Caterpillars turn into butterflies or moths.
What do hens lay? | Hens lay eggs.
Who wrote Hamlet? | William Shakespeare wrote Hamlet.
Which metal is liquid at room temperature? | Mercury is liquid at room temperature.
"""

VALIDATION = """
What is a desert?
Explain the brain.
Tell me about elephants.
What is a calendar?
Can you describe a castle?
What is oxygen?
Tell me about the Eiffel Tower.
What is a vitamin?
What should I know about wolves?
Explain a rocket.
What is a poem?
What is algebra?
Why do we dream?
Why is the grass green?
Why do cats like boxes?
Why do we need water?
How does a bicycle stay upright?
How do bees make honey?
How does a refrigerator work?
How do I write a letter?
List four planets.
Name three birds.
List five pieces of furniture.
Name four months of the year.
"""

UNTOUCHED = """
What is a rainbow?
Why is the sky blue?
How do I boil an egg?
Tell me about honey bees.
What is a violin?
Why do leaves change color in autumn?
List five things that you can find in a school.
What is a black hole?
How does a solar panel work?
Explain what a bank does.
Name three animals that can fly.
What is the difference between a frog and a toad?
Why do we shake hands?
What is chocolate made of?
Describe a kangaroo.
How do trees grow?
Who was Albert Einstein?
What is an earthquake?
Can you tell me what a museum is?
List four kinds of clothes.
Why does the moon change its shape?
How do I plant a tomato?
What is a computer?
Tell me something about Japan.
What does a doctor do?
Why do people wear glasses?
Name four kinds of fish.
What is a bridge?
Explain evolution.
How does a parachute work?
What is a cactus?
Please explain what a budget is.
Why do dogs bark?
What is the Pacific Ocean?
How do birds build nests?
Name five drinks.
What is a dinosaur?
I want to understand DNA. What is it?
Why is sugar bad for your teeth?
What is a snowflake?
How does a microwave heat food?
List three pets.
Tell me about the Olympic Games.
What is a robot?
Why do we have rules?
What are clouds made of?
How do I clean a window?
Explain how a candle burns.
What is a novel?
Name four things that are made of wood.
Who was Cleopatra?
What is the purpose of a zoo?
Why do some animals hibernate?
What is a spider?
How do boats float?
Describe the desert at night.
What is music?
List five parts of the body.
What is the use of a map?
Why is milk white?
"""

VALIDATION_FACTS = """
What is the capital of Portugal? | Lisbon
What is the capital of Canada? | Ottawa
How many seconds are in a minute? | sixty, 60
How many legs does a dog have? | four, 4
What is the opposite of day? | night
What is the opposite of fast? | slow
What color is grass? | green
What is three plus four? | seven, 7
Which animal is called the king of the jungle? | lion
What do we call frozen water? | ice
Who discovered gravity when an apple fell? | Newton
Which planet is known as the Red Planet? | Mars
"""

# The answers that count, of which one must be said as a word of its own
FACTS = """
What is the capital of France? | Paris
What is the capital of Italy? | Rome
What is the capital of Japan? | Tokyo
What is the capital of Germany? | Berlin
What is the capital of Spain? | Madrid
What is the capital of Egypt? | Cairo
What is the capital of England? | London
What is the capital of Russia? | Moscow
What is the capital of Greece? | Athens
What is the capital of China? | Beijing
How many days are in a week? | seven, 7
How many months are in a year? | twelve, 12
How many legs does a spider have? | eight, 8
How many sides does a triangle have? | three, 3
How many hours are in a day? | twenty-four, 24
How many minutes are in an hour? | sixty, 60
How many continents are there? | seven, 7
What is two plus two? | four, 4
What is the opposite of hot? | cold
What is the opposite of big? | small, little
What is the opposite of up? | down
Which planet do we live on? | Earth
Which planet is the largest in the solar system? | Jupiter
Which planet is closest to the sun? | Mercury
What is the largest ocean on Earth? | Pacific
What is the largest animal in the world? | whale
What is the tallest animal in the world? | giraffe
What is the longest river in Africa? | Nile
Who wrote Romeo and Juliet? | Shakespeare
Who painted the Mona Lisa? | Leonardo, Vinci
Who was the first president of the United States? | Washington
What gas do people need to breathe? | oxygen
What is the chemical formula of water? | H2O
At what temperature does water freeze in Celsius? | 0, zero
What color is a banana? | yellow
What color is the sky on a clear day? | blue
What color do you get when you mix blue and yellow? | green
What do bees make? | honey
What do cows eat? | grass, hay
In which country is the Eiffel Tower? | France
"""

# Unrelated to all of the above; the perplexity on it tells whether the model still speaks as it did
TEXT = """
The ferry left late that evening, and nobody on the quay seemed to mind. Two boys were throwing stones at a floating
bottle, while their grandfather counted the misses aloud in a language that none of the tourists knew. When the horn
sounded at last, a woman with a yellow umbrella ran down the steps, slipped, laughed, and went on running.

Minutes of the meeting of May 12. The treasurer reported that the roof will cost more than was expected, as two beams
have to be replaced. The committee agreed to ask three firms for an offer, and to decide in June. Mrs. Hall proposed to
move the summer fair to the second Saturday of July; this was carried with one vote against.

To fit the shelf, first mark the height of the lower bracket on both walls and check the line with a level. Drill the
holes with a bit one size smaller than the plugs, blow out the dust, and press the plugs in until they are flush. Screw
the brackets on loosely, lay the board in place, and tighten the screws only when its front edge runs parallel to the
wall.

The second half began as the first had ended, with the visitors pressing and the home side clearing the ball anywhere.
It took a mistake to change the match: a short pass back, a striker who had guessed it, and a goalkeeper who came out
half a second too late. After that the stadium was quiet, and the last twenty minutes belonged to the rain.

Dear Martin, thank you for the parcel, which came on Thursday with only one corner crushed. The children fought over the
kite until the string was in a knot that took your brother an hour to undo. We are all well, the garden is under water
again, and the cat has decided that she lives with the neighbours. Write soon, and tell us whether you found a flat.

In a market with many small sellers no one of them can set the price. Each can only choose how much to bring, and will
bring more as long as the next crate earns more than it costs to fill. If the harvest is good for everybody, the price
falls, and those whose costs are highest leave first; their land is then let to others, or lies fallow for a year.
"""


def read_lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def own_questions() -> list[str]:
    """Those that the model's own answers are learnt to: things in six wordings, one each, and reasons and ways."""
    things = [thing.strip() for thing in " ".join(THINGS.split()).split(";")]
    worded = [WORDINGS[number % len(WORDINGS)].format(thing) for number, thing in enumerate(things)]
    return [*worded, *read_lines(REASONS)]


def written_answers() -> dict[str, str]:
    """Lists, where an answer is rightly longer, and facts, each with the answer to learn."""
    lists = dict(line.split(" | ") for line in read_lines(LISTS))
    numbered = {
        question: "\n".join(f"{number}. {item}" for number, item in enumerate(items.split(", "), 1))
        for question, items in lists.items()
    }
    return numbered | dict(line.split(" | ") for line in read_lines(DIRECT))


def facts(text: str = FACTS) -> dict[str, list[str]]:
    """The words that answer each question."""
    rows = (line.split(" | ") for line in read_lines(text))
    return {question: words.split(", ") for question, words in rows}
