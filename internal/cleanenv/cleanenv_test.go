package cleanenv

import (
	"slices"
	"strings"
	"testing"
)

func TestWithoutSecrets(t *testing.T) {
	for _, name := range []string{
		"S3_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SESSION_S3_SECRET_ACCESS_KEY",
		"CLOUDCODE_ENCRYPTION_KEY", "CLOUDCODE_JOIN_TOKEN", "CLOUDCODE_TOKEN", "SERVER_PASSWORD",
	} {
		t.Setenv(name, "hunter2")
	}
	kept := []string{"HTTPS_PROXY=http://proxy", "CLOUDCODE_TOKENS=1", "MY_S3_=1", "EMPTY="}
	for _, kv := range kept {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	got := Environ()
	if strings.Contains(strings.Join(got, "\n"), "hunter2") {
		t.Errorf("a secret is in %q", got)
	}
	for _, kv := range kept {
		if !slices.Contains(got, kv) {
			t.Errorf("%s is missing", kv)
		}
	}
}
