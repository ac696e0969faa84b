package api

import (
	"crypto/rand"
	"math/big"
	"strings"
)

// Words that are short, easy to say and friendly.
var (
	adjectives = strings.Fields("able bold brave bright brisk calm clear clever cool cosy crisp eager early easy fair fast fine fond free fresh gentle glad good grand great green happy keen kind lively loyal lucky mellow merry mild neat nice noble plain proud quick quiet rapid ready sharp shiny silent smart snug soft solid sunny swift tidy vivid warm wise witty young")
	nouns      = strings.Fields("ant badger bear beaver bee bird bison camel cat cobra cow crab crane crow deer dingo dog dove duck eagle eel elk falcon ferret finch fish fox frog gecko goat goose gull hare hawk heron horse ibis jay koala lamb lark lion llama lynx mole moose moth mouse mule newt otter owl panda pony puma quail rabbit raven robin seal shark sheep sloth snail stork swan tiger toad trout tuna viper whale wolf wren yak zebra")
)

// newID returns an id such as `swift-otter-x4k2`: to be read out and remembered,
// and one of some five billion.
func newID() string {
	const letters = "abcdefghjkmnpqrstuvwxyz23456789" // none that look alike
	suffix := make([]byte, 4)
	for i := range suffix {
		suffix[i] = letters[random(len(letters))]
	}
	return adjectives[random(len(adjectives))] + "-" + nouns[random(len(nouns))] + "-" + string(suffix)
}

func random(n int) int {
	i, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return int(i.Int64())
}
