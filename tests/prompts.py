"""Prompts for tests and quick benchmarks, written for this project: short, varied, real enough to make a model think.

`PROMPTS` are single user messages. `EDITS` are tasks whose answer mostly repeats a text that the prompt holds; each comes
with that text, which is what a client would send as `prediction`.
"""

from __future__ import annotations

from typing import NamedTuple

CHAT = [
    "What should I pack for three days of walking in the hills in October?",
    "My neighbour plays the drums at night. How do I bring it up politely?",
    "Explain to a ten-year-old why the sky is blue.",
    "Suggest a simple dinner for four people with chickpeas and spinach.",
    "Is it better to learn the piano or the guitar first?",
    "Give me three good reasons to keep a diary.",
    "Write a short poem about a lighthouse that is afraid of the dark.",
    "What is the difference between weather and climate?",
    "How do I keep basil alive on a windowsill in winter?",
    "Tell me about the history of the bicycle in a few sentences.",
    "I have an interview tomorrow and I am nervous. What can I do tonight?",
    "Write an opening line for a detective story set in a bakery.",
    "Why do cats knead blankets?",
    "Plan a birthday party for a child who loves dinosaurs.",
    "What does a conductor actually do in an orchestra?",
    "Name five rivers in Europe and one city on each.",
]

CODE = [
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "Write a SQL query that lists the ten customers with the highest total orders.",
    "Explain what this does: `x = [i * i for i in range(10) if i % 2]`",
    "Write a JavaScript function that removes duplicates from an array and keeps the order.",
    "What is wrong with this code?\n\ndef mean(values):\n    return sum(values) / len(value)\n",
    "Write a bash one-liner that counts the lines of all .py files below the current folder.",
    "Show a minimal HTTP server in Go that answers every request with 'ok'.",
    "Write a regular expression for dates of the form 2024-03-31.",
    "Implement binary search in C and comment each line.",
    "Complete this function:\n\ndef is_palindrome(text: str) -> bool:\n",
    "Write a unit test with pytest for a function add(a, b).",
    "Turn this loop into a list comprehension:\n\nout = []\nfor w in words:\n    if len(w) > 3:\n        out.append(w.lower())\n",
]

MATH = [
    "A train travels 180 km in 2 hours and 15 minutes. What is its average speed?",
    "Anna has 3 times as many stickers as Ben. Together they have 48. How many does Anna have?",
    "What is 17 * 24? Show each step.",
    "A shirt costs 40 euros and is reduced by 15 percent. What is the new price?",
    "Solve for x: 5x - 7 = 2x + 11",
    "How many ways are there to choose 2 books out of 6?",
    "A rectangle is twice as long as it is wide and its perimeter is 36 cm. Find its area.",
    "If it takes 4 painters 6 days to paint a hall, how long do 3 painters need?",
    "What is the next number: 2, 6, 12, 20, 30, ...?",
    "A bag holds 5 red and 3 blue marbles. What is the chance of drawing two red ones in a row?",
]

EXTRACTION = [
    "List the people named in this text as a JSON array.\n\nOn Monday Maria Lopez met Dr. Chen in Lisbon; Tom joined by phone.",
    "Extract the total and the date.\n\nInvoice 8841, 12 May 2023. Paper 14.20, ink 31.00, delivery 4.90. Total 50.10.",
    "Is the mood of this review good or bad? Answer with one word.\n\nThe soup was cold, but the waiter so kind that we stayed.",
    "Summarise in one sentence.\n\nThe library closes at noon on Friday for repairs; books due then may come back on Monday.",
    "Which of these are fruits? carrot, plum, spinach, pear, onion, quince",
    "Write these as a table with the columns name and age: Ida is 31, Omar is 28, and Lin turned 45 last week.",
    "Give a title to this text.\n\nBees find their way home by the sun, and on cloudy days by the pattern of polarised light.",
    "Which city does the sender live in?\n\nDear all, since I moved from Oslo to Porto last year I have had no cold morning.",
]

LANGUAGES = [
    "Erkläre in zwei Sätzen, wie eine Wärmepumpe funktioniert.",
    "Wie sage ich auf Englisch höflich, dass ich später komme?",
    "Donne-moi une recette simple de crêpes.",
    "Quelle est la capitale de l'Australie, et pourquoi n'est-ce pas Sydney ?",
    "Escribe un mensaje corto para felicitar a una amiga por su nuevo trabajo.",
    "¿Cuántos planetas tiene el sistema solar? Nómbralos en orden.",
    "Scrivi tre frasi sulla tua città ideale.",
    "Explique em português o que é a inflação.",
    "Translate into French: The museum is closed on Tuesdays.",
    "Vertaal naar het Nederlands: I would like a cup of tea without sugar.",
    "日本の四季について短く説明してください。",
    "请用一句话解释什么是机器学习。",
    "Расскажи коротко, почему листья осенью меняют цвет.",
    "اكتب جملة قصيرة عن البحر.",
    "한국어로 자기소개를 짧게 써 주세요.",
    "Napisz krótkie zaproszenie na urodziny.",
]


class Edit(NamedTuple):
    prompt: str
    source: str


_NOTE = (
    "The workshop starts at nine in the main hall. Please bring a laptop and a charger. Lunch is served at half past twelve in"
    " the garden, and the last session ends at five. Parking is free behind the building."
)
_CLASS = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
        return len(self.items)
"""
_JSON = """{
  "name": "harbour-lights",
  "version": "1.4.2",
  "port": 8080,
  "debug": false,
  "workers": 4,
  "log": {"level": "info", "file": "lights.log"}
}
"""
_CSV = "id,city,country,visitors\n1,Bergen,Norway,1840\n2,Ghent,Belgium,2210\n3,Graz,Austria,1975\n4,Turku,Finland,1320\n"
_LETTER = (
    "Dear Mr Holm,\n\nthank you for your order of 14 March. Unfortunately the blue chairs are sold out until April. We can send"
    " you the grey ones at once, or the blue ones in five weeks. Please let us know what you prefer.\n\nKind regards,\nEva Brandt"
)
_STEPS = (
    "1. Fill the tank with water.\n2. Close the lid and turn it to the left.\n3. Press the green button.\n"
    "4. Wait until the light stops blinking.\n5. Open the valve slowly.\n"
)

EDITS = [
    Edit(f"Repeat this text word for word.\n\n{_NOTE}", _NOTE),
    Edit(f"Correct the start time to ten and repeat the rest unchanged.\n\n{_NOTE}", _NOTE),
    Edit(f"Rename the class Stack to Pile and write out the whole code.\n\n{_CLASS}", _CLASS),
    Edit(f"Add type hints to this class and write out the whole code.\n\n{_CLASS}", _CLASS),
    Edit(f"Set the port to 9090 and answer with the whole file.\n\n{_JSON}", _JSON),
    Edit(f"Answer with this file, with debug switched on.\n\n{_JSON}", _JSON),
    Edit(f"Write this table again without the row for Graz.\n\n{_CSV}", _CSV),
    Edit(f"Copy this table exactly.\n\n{_CSV}", _CSV),
    Edit(f"Write this letter again, addressed to Ms Lind.\n\n{_LETTER}", _LETTER),
    Edit(f"Write out these steps again, with the red button instead of the green one.\n\n{_STEPS}", _STEPS),
]

PROMPTS: list[str] = [*CHAT, *CODE, *MATH, *EXTRACTION, *LANGUAGES, *(edit.prompt for edit in EDITS)]
