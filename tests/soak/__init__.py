"""What the program writes can be trusted: killed, signalled, raced and starved, at real size.

Every test exists twice: a quick slice that is part of `make test`, and the whole, `make soak`.
"""
