BY_HAND = ()
SAME = ()
