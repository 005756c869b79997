"""The fixed text of ``perplexity.py``: plain English, written for it, so that no model knows it."""

_WRAPPED = """\
The ferry to the island left at half past six in the morning, and for most of the year it left
almost empty. Anna Lindqvist had worked on it for eleven years, first selling tickets and coffee,
then, after she had passed her examinations, as second mate. She liked the early crossing best. The
sea was usually calm before the sun had warmed the land, and the few people on board did not want
to talk. There was the postman with his grey sacks, a teacher who corrected exercises with a red
pencil, and twice a week a man from the electricity company who slept with his cap over his eyes.

On the morning this story begins there was one passenger more. He was an old man in a brown coat,
and he carried a wooden box that he would not put down. When Anna asked him for his ticket he set
the box on his knees, held it with one hand, and looked for the ticket with the other. It took him
a long time. She waited, because there was nothing else to do, and because she was curious about
the box. It was about as large as a loaf of bread, and it ticked.

"It is a clock," said the old man, who had seen her look. "You need not be afraid. It belongs to
the lighthouse. My father repaired it in the year I was born, and now it is my turn, although I
have only repaired it and not made it better. A good clock cannot be made better. It can only be
made to go on."

She told him that nobody lived in the lighthouse any longer. The lamp had been changed for an
automatic one before she was born, and once a year somebody came from the mainland to clean the
glass and to see whether the birds had built their nests in the wrong place. The old man nodded, as
if this were something he had expected to hear, and had heard before.

"A lamp has to know what time it is," he said. "So does a person. It does not matter who looks."

The island came into view a little after seven. From the west it looks like a sleeping animal, with
the lighthouse standing on its back, and the houses of the village hidden behind its shoulder.
Sixty people live there in winter. In summer there are four hundred, most of whom come to paint the
same three boats and the same red door. There is one shop, which is also the post office and, on
Saturdays, the place where men have their hair cut. There is a school with nine children. There
used to be a doctor, but the last one married a woman from the south and moved to be near her
mother.

The old man was the first to leave the ferry. He walked slowly up the road, past the shop and the
school, and Anna, who had two hours before the ferry went back, found that she was walking behind
him. She told herself that somebody had to carry the box if he became tired. He did not become
tired. At the top of the hill he took a key out of his coat, a heavy iron key with a number
scratched into it, and opened the door of the lighthouse as if he had closed it the evening before.

Inside it was cold and smelled of salt and oil. A staircase of one hundred and twelve steps went up
along the wall. Halfway there was a small room with a table, a chair, and a shelf, and over the
shelf a pale round place on the wall where something had hung for many years. The old man opened
the box, took out the clock, and hung it there. It fitted exactly. Then he took a notebook from the
drawer of the table, looked at his own watch, and wrote down the date, the hour, and the minute.
Anna saw that the page was full of such lines, and that the one before was forty years old.

"What happens now?" she asked.

"Now it is right again," he said. "Tomorrow it will be a few seconds slow. Somebody should come
once a week, wind it, and write down how much it has lost. If you know how wrong a clock is, it is
as good as a clock that is right. My father said that about people too, but he was thinking of my
uncle."

On the way down she asked him why he had waited for so long. He had not waited, he answered. There
had been a war, and then work, and then children, and a house that needed a new roof. Each year he
had meant to do it, and each year there had been a good reason to do it in the next. In the end he
had understood that the good reasons would never come to an end, and that he would, so he had
bought a ticket for the ferry.

He did not come back with her that day. When she asked for him in the shop, a week later, they told
her that he had rented the room over the bakery, that he walked up the hill every Sunday at noon,
and that he had begun to teach the nine children how to read a chart. In March he fell ill. He gave
Anna the key, the iron one with the number, and did not say what it was for.

That is how the second mate of the morning ferry came to be the keeper of a clock that nobody
needs. She winds it every Sunday, and writes down how much it has lost: four seconds in a warm
week, six in a cold one. The people of the island say that it is a waste of time. But if you ask
them for the hour, they will look up at the lighthouse before they answer, and some of them, when
they think that no one is watching, put their own watches right.
"""

TEXT = "\n\n".join(" ".join(paragraph.split()) for paragraph in _WRAPPED.split("\n\n"))
