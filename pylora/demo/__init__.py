"""`pylora demo`: a real model learns a notation it has never seen, measured before and after."""
