"""Where is a number kept?"""
