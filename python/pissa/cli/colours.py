"""The colours of all pictures: of runs, of reports, of `bench`, of the book. A method has one colour everywhere."""

# Okabe and Ito's colours differ to every kind of colour blindness; their yellow is too pale for print.
BLUE, SKY, GREEN, ORANGE, RED, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
BLACK, GREY = "#000000", "#777777"

LORA, PISSA, QPISSA, LOFTQ = BLUE, RED, PINK, GREEN
