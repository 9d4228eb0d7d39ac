"""Files that somebody else may have written, read without trusting them.

Pickle runs whatever it is told to, so no pickle of a file is opened by a library before its classes were compared
with a short list here; and what a header counts is compared with the size of its file before anybody makes room for it.
"""
