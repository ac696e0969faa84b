package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestStorageProfiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "profiles.json")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const complete = `"endpoint": "http://localhost:1", "bucket": "team", "access_key_id": "k", "secret_access_key": "hunter2"`
	env := map[string]string{"S3_ENDPOINT": "https://s3.example.com", "S3_BUCKET": "main", "S3_ACCESS_KEY_ID": "k", "S3_SECRET_ACCESS_KEY": "hunter2"}
	without := func(names ...string) map[string]string {
		out := map[string]string{}
		for k, v := range env {
			if !slices.Contains(names, k) {
				out[k] = v
			}
		}
		return out
	}
	for name, c := range map[string]struct {
		env  map[string]string
		file string
		want []string // profiles
		says []string // the error
	}{
		"nothing":     {},
		"environment": {env: env, want: []string{"default"}},
		"both":        {env: env, file: `{"profiles": {"team": {` + complete + `}}}`, want: []string{"default", "team"}},
		"file alone":  {file: `{"profiles": {"team": {` + complete + `}}}`, want: []string{"team"}},
		"incomplete":  {env: without("S3_BUCKET", "S3_SECRET_ACCESS_KEY"), says: []string{"S3_BUCKET", "S3_SECRET_ACCESS_KEY"}},
		"only prefix": {env: map[string]string{"S3_PREFIX": "p"}, says: []string{"S3_ENDPOINT", "S3_BUCKET"}},
		"bad file":    {file: `{"profiles": {"team": {"bucket": "b"}}}`, says: []string{"--storage-profiles", file, "team", "endpoint"}},
		"twice":       {env: env, file: `{"profiles": {"default": {` + complete + `}}}`, says: []string{"default"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := &serverFlags{}
			if c.file != "" {
				write(c.file)
				f.storageProfiles = file
			}
			got, err := f.profiles(func(name string) string { return c.env[name] })
			if c.says == nil {
				if err != nil || !slices.Equal(got.Names(), c.want) {
					t.Errorf("%v, %v", got.Names(), err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, text := range c.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret is in %q", err)
			}
		})
	}
}
