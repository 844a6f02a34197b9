"""The report of the least trustworthy answers, in the terminal and as a page."""
