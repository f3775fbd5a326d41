"""The text that quantised weights are measured on: prose, questions and code, a few hundred tokens. Changing it changes every figure."""

TEXT = '''A lighthouse keeper writes down the weather every morning before anything else. The wind came from the north today, the sea was
grey, and three fishing boats went out in spite of it. By noon they were back. One of them had a torn net, and the youngest of the crew
sat on the harbour wall, mending it with a wooden needle while the gulls walked up and down beside him, waiting for something to fall.

Question: Why does bread rise? Answer: Yeast eats the sugar in the dough and gives off carbon dioxide. The gas is caught in the net of
gluten that kneading has made, so that the dough grows. In the oven the bubbles swell once more, then the crumb sets around them.

The function below returns the longest run of equal items in a list. It looks at each item once and keeps two numbers, the length of
the run that is going on and the best length seen so far.

def longest_run(items):
    """Return the length of the longest run of equal items; 0 for an empty list."""
    best = current = 0
    previous = object()
    for item in items:
        current = current + 1 if item == previous else 1
        best = max(best, current)
        previous = item
    return best

>>> longest_run([1, 1, 2, 2, 2, 3])
3

In 1854 a physician in London marked every death from cholera on a map of the streets. The marks lay closest around a single pump. When
its handle was taken away the outbreak, which was fading already, came to an end. The map is remembered because it turned an argument
about bad air into one about water, and because anyone who looks at it can follow the reasoning without knowing any medicine.

import json

with open("settings.json", encoding="utf-8") as file:
    settings = json.load(file)
for name, value in sorted(settings.items()):
    print(f"{name}: {value}")

If a train leaves at nine and travels at eighty kilometres an hour, and another follows half an hour later at one hundred and twenty,
the second catches up after one hour, eighty plus forty kilometres from where both began.
'''
