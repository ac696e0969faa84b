// Package cleanenv is the environment of the programs that we start.
package cleanenv

import (
	"os"
	"slices"
	"strings"
)

// secrets are the names, or what names begin with, of variables that only we are to read.
var secrets = []string{
	"S3_", "AWS_", "SESSION_S3_", "CLOUDCODE_ENCRYPTION_KEY", "CLOUDCODE_JOIN_TOKEN", "CLOUDCODE_TOKEN", "SERVER_PASSWORD",
}

// Environ is os.Environ without our keys and passwords: of a program that runs
// for long, or runs others, anybody might look into it.
func Environ() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(secrets, func(s string) bool {
			return name == s || strings.HasSuffix(s, "_") && strings.HasPrefix(name, s)
		})
	})
}
