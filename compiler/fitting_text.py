"""The text that `--calibration` fits integers to where no `--calibration-data` is given: prose, questions, code, tables, several languages.

It shares nothing with calibration_text.py, on which the result is measured: what was fitted to a text looks better on it than it is.
"""

TEXT = '''The ferry left at six, before the fog had lifted. Anna stood at the rail with her collar up and watched the lights of the town
grow small. She had packed in a hurry: two shirts, a book she had already read, and the letter. The letter was short. It said that the house
was hers if she wanted it, that the roof leaked over the kitchen, and that the key hung where it had always hung. She had not been there
for eleven years. An old man beside her was feeding crumbs to the gulls, one at a time, as if he were paying a debt.

Question: How do I keep a sourdough starter alive while I travel?
Answer: Feed it with equal weights of flour and water, let it stand for an hour, then put it into the refrigerator. At four degrees it
needs food about once a week; after a month it will be sour and slow, but two or three feedings at room temperature bring it back.
Question: And if it has turned grey on top?
Answer: A grey liquid is alcohol and harmless; pour it off. Pink or orange streaks are a reason to throw it away.

def merge(left, right):
    """Merge two sorted lists into one sorted list."""
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]


class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()

    def __len__(self):
        return len(self._items)

The heart of a four-stroke engine is a cycle of intake, compression, power and exhaust. On the first stroke the piston moves down and
draws in a mixture of air and fuel. On the second it moves up and presses the mixture into about a tenth of its volume, which heats it.
A spark sets it alight, and on the third stroke the hot gas drives the piston down again; this is the only stroke that does work. On the
fourth the piston pushes the burnt gas out. Two turns of the crankshaft make one cycle, so a camshaft runs at half the engine's speed.

#include <stdio.h>

int main(void)
{
    unsigned long long a = 0, b = 1;
    for (int i = 0; i < 20; i++) {
        printf("%d: %llu\\n", i, a);
        unsigned long long next = a + b;
        a = b;
        b = next;
    }
    return 0;
}

| city      | country | inhabitants | height above the sea |
|-----------|---------|-------------|----------------------|
| Lisbon    | Portugal|     545,000 |                 15 m |
| Bern      | Swiss   |     134,000 |                540 m |
| Quito     | Ecuador |   1,800,000 |              2,850 m |

{"order": 48213, "customer": {"name": "R. Okafor", "city": "Leeds"}, "items": [{"sku": "LMP-4", "count": 2, "price": 34.5},
{"sku": "BLB-9", "count": 8, "price": 3.25}], "paid": true, "note": null}

Solve 3x + 7 = 2(x + 9). Expanding the right side gives 3x + 7 = 2x + 18. Subtract 2x from both sides: x + 7 = 18, hence x = 11.
To check, put 11 back: the left side is 33 + 7 = 40, the right side 2 times 20 = 40. Both agree.

Le marché ouvre à sept heures. On y trouve des pommes, du fromage de brebis et, le samedi, un homme qui aiguise les couteaux. Il ne
parle presque pas, mais il connaît le prénom de chaque client. Quand il pleut, tout le monde se serre sous la même bâche.
Der Zug hatte zwanzig Minuten Verspätung, und niemand wusste warum. Die Kinder zählten die Güterwagen auf dem anderen Gleis, ein Mann
las zum zweiten Mal dieselbe Zeitung, und der Himmel über dem Bahnhof wurde langsam gelb.
La biblioteca cierra a las nueve. Los estudiantes recogen sus cuadernos, apagan las lámparas y bajan la escalera en silencio.

SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS spent
FROM customers AS c LEFT JOIN orders AS o ON o.customer_id = c.id
WHERE o.placed_at >= '2023-01-01' GROUP BY c.name HAVING COUNT(o.id) > 3 ORDER BY spent DESC;

Dear Ms Hartley, thank you for your message of the fourth of May. We have looked into the delay and found that the parcel was held at
the depot because the street number on the label was not readable. It left this morning and should be with you by Thursday. We have
returned the cost of delivery to your card. If anything else is missing, please answer this message, and we will see to it at once.

import csv
import sys
from collections import defaultdict


def totals(path):
    """Sum the column `amount` of a CSV file by the column `category`."""
    sums = defaultdict(float)
    with open(path, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            sums[row["category"]] += float(row["amount"])
    return dict(sums)


if __name__ == "__main__":
    for category, amount in sorted(totals(sys.argv[1]).items()):
        print(f"{category:<20} {amount:>10.2f}")

User: What does os.path.join do?
Assistant: It joins one or more path components with the separator of the operating system. If a component is absolute, all components
before it are dropped and joining goes on from there. An empty last component leaves a separator at the end.
User: What is the difference between a list and a tuple?
Assistant: A list can be changed after it is made, a tuple cannot. A tuple of hashable items can therefore be a key of a dictionary.

Most of the water on Earth is salt. Of the small part that is fresh, more than two thirds is frozen in ice sheets and glaciers, and most
of the rest lies in the ground. Rivers and lakes, from which people have drunk for as long as there have been people, hold less than one
part in three hundred of the fresh water. A drop stays in a river for about two weeks, in a lake for some years, in the deep ground for
thousands. What falls as rain on a hill today may have been snow on another continent when the hill was under the sea.

function debounce(callback, delay) {
  let timer = null;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => callback(...args), delay);
  };
}

Ingredients: 250 g flour, 125 g cold butter, 1 egg, a pinch of salt, 2 tablespoons of water. Rub the butter into the flour until it
looks like coarse sand. Add the egg, the salt and the water, press everything together and let it rest in the cold for half an hour.
Roll it out to the thickness of a coin, line a tin with it, prick the bottom with a fork and bake it at 190 degrees for fifteen minutes.

The treaty was signed in the autumn of 1648, after four years of talks in two cities thirty miles apart, because the parties could not
agree to sit in one room. It ended a war that had emptied whole regions. Historians still argue about what it changed. Some see in it
the beginning of the modern state, sovereign within its borders; others point out that the text says little of the kind, and that later
writers put into it what they needed to find.

Traceback (most recent call last):
  File "app.py", line 41, in <module>
    main()
  File "app.py", line 36, in main
    config = load(path)
  File "app.py", line 12, in load
    return json.loads(text)
json.decoder.JSONDecodeError: Expecting ',' delimiter: line 7 column 3 (char 142)

A: Did you see the match last night?
B: Only the second half. I came home when it was already two to one.
A: Then you missed the best goal. From the halfway line, with the keeper standing far out of his box.
B: I read about it this morning. They say he tried the same thing in training for a month and never hit the target once.
'''
