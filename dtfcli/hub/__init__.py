"""Publishing a model: chosen, described, searched for secrets, uploaded in one commit.

In: a model folder. Out: a commit on the Hub, or a folder of what would be uploaded.
"""
