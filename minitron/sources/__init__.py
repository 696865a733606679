"""Where documents come from: files, a dataset of the Hub, generated problems, the embedded text; and what one record of them is, a text or a conversation."""
