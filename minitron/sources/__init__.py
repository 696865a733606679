"""Where documents come from: files as they are, a dataset of the Hub, generated problems, the embedded text; and what one record of them is."""
