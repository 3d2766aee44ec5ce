"""Which layers go?"""
