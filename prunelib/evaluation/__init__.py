"""What is lost?"""
