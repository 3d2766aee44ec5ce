"""What does a user run on a model of their own?"""
