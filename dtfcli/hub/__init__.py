"""Publishing a model: choose its files, describe it, search them for secrets, upload them in one commit.

In: a model folder. Out: a commit on the Hub, or a folder with the files of a push.
"""
