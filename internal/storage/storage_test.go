package storage_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

func TestParseOwnPolicy(t *testing.T) {
	for in, want := range map[string]storage.OwnPolicy{"": storage.OwnPublic, "public": storage.OwnPublic, "deny": storage.OwnDeny, "any": storage.OwnAny} {
		if got, err := storage.ParseOwnPolicy(in); got != want || err != nil {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, bad := range []string{"Public", "all", " any"} {
		if _, err := storage.ParseOwnPolicy(bad); !errors.Is(err, storage.ErrInvalid) || !strings.Contains(err.Error(), "deny, public or any") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var fullEnv = map[string]string{
	"S3_ENDPOINT": "https://fly.storage.tigris.dev", "S3_BUCKET": "bucket",
	"S3_ACCESS_KEY_ID": "tid_abc", "S3_SECRET_ACCESS_KEY": "tsec_verysecret",
}

func env(changes map[string]string) func(string) string {
	m := maps.Clone(fullEnv)
	maps.Copy(m, changes)
	return func(name string) string { return m[name] }
}

func TestFromEnv(t *testing.T) {
	c, err := storage.FromEnv(func(string) string { return "" })
	if c != nil || err != nil {
		t.Errorf("nothing set: %v, %v", c, err)
	}
	c, err = storage.FromEnv(env(nil))
	if err != nil {
		t.Fatal(err)
	}
	if want := (storage.Config{Endpoint: "https://fly.storage.tigris.dev", Bucket: "bucket", AccessKeyID: "tid_abc", SecretAccessKey: "tsec_verysecret"}); c.String() != want.String() ||
		c.SecretAccessKey != want.SecretAccessKey || c.AccessKeyID != want.AccessKeyID || c.PathStyle || c.Region != "" || c.EncryptionKey != nil {
		t.Errorf("got %+v", c)
	}
	key := bytes.Repeat([]byte{7}, 32)
	c, err = storage.FromEnv(env(map[string]string{
		"S3_REGION": "eu-1", "S3_PATH_STYLE": "true", "S3_PREFIX": "/team/a/", "TIGRISFS_ARGS": "--debug_s3",
		"CLOUDCODE_ENCRYPTION_KEY": base64.StdEncoding.EncodeToString(key) + "\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if c.Region != "eu-1" || !c.PathStyle || c.Root != "team/a" || c.TigrisFSArgs != "--debug_s3" || !bytes.Equal(c.EncryptionKey, key) {
		t.Errorf("got %+v with key %x", c, c.EncryptionKey)
	}
	// For the profiles of a file alone.
	c, err = storage.FromEnv(func(name string) string {
		if name == "CLOUDCODE_ENCRYPTION_KEY" {
			return base64.StdEncoding.EncodeToString(key)
		}
		return ""
	})
	if c != nil || err != nil {
		t.Errorf("a key alone: %v, %v", c, err)
	}
}

func TestFromEnvSaysWhatIsWrong(t *testing.T) {
	for _, c := range []struct {
		name    string
		changes map[string]string
		words   []string
		not     []string
	}{
		{"one missing", map[string]string{"S3_BUCKET": ""}, []string{"S3_ENDPOINT, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY is set, but not S3_BUCKET:"}, nil},
		{"two missing", map[string]string{"S3_ACCESS_KEY_ID": " ", "S3_SECRET_ACCESS_KEY": ""}, []string{"but not S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY:"}, nil},
		{"bucket alone", map[string]string{"S3_ENDPOINT": "", "S3_ACCESS_KEY_ID": "", "S3_SECRET_ACCESS_KEY": ""}, []string{"S3_BUCKET is set, but not S3_ENDPOINT, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY"}, nil},
		{"prefix alone", map[string]string{"S3_BUCKET": "", "S3_ENDPOINT": "", "S3_ACCESS_KEY_ID": "", "S3_SECRET_ACCESS_KEY": "", "S3_PREFIX": "x"}, []string{"S3_PREFIX is set, but not S3_ENDPOINT"}, nil},
		{"path style", map[string]string{"S3_PATH_STYLE": "maybe"}, []string{"S3_PATH_STYLE", "maybe", "true or false"}, nil},
		{"no scheme", map[string]string{"S3_ENDPOINT": "fly.storage.tigris.dev"}, []string{"S3_ENDPOINT", "https://"}, nil},
		{"path", map[string]string{"S3_ENDPOINT": "https://s3.example.com/bucket"}, []string{"S3_ENDPOINT", "without what follows the host"}, nil},
		{"keys in the URL", map[string]string{"S3_ENDPOINT": "https://user:hunter2@s3.example.com"}, []string{"S3_ENDPOINT", "keys"}, []string{"hunter2"}},
		{"port", map[string]string{"S3_ENDPOINT": "https://s3.example.com:99999"}, []string{"S3_ENDPOINT", "port"}, nil},
		{"bucket with a slash", map[string]string{"S3_BUCKET": "bucket/folder"}, []string{"S3_BUCKET", "bucket/folder"}, nil},
		{"secret with a space", map[string]string{"S3_SECRET_ACCESS_KEY": "hunter2 hunter2"}, []string{"S3_SECRET_ACCESS_KEY"}, []string{"hunter2"}},
		{"prefix that climbs", map[string]string{"S3_PREFIX": "a/../b"}, []string{"S3_PREFIX", ".."}, nil},
		{"prefix in our own", map[string]string{"S3_PREFIX": "a/.cloudcode"}, []string{"S3_PREFIX", ".cloudcode"}, nil},
		{"short key", map[string]string{"CLOUDCODE_ENCRYPTION_KEY": "aHVudGVyMg=="}, []string{"CLOUDCODE_ENCRYPTION_KEY", "openssl rand -base64 32"}, []string{"aHVudGVyMg", "hunter2"}},
		{"no base64", map[string]string{"CLOUDCODE_ENCRYPTION_KEY": "hunter2!"}, []string{"CLOUDCODE_ENCRYPTION_KEY", "openssl rand -base64 32"}, []string{"hunter2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := storage.FromEnv(env(c.changes))
			wantInvalid(t, got, err, c.words, append(c.not, "tsec_"))
		})
	}
}

func wantInvalid(t *testing.T, got any, err error, words, not []string) {
	t.Helper()
	if !errors.Is(err, storage.ErrInvalid) {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q lacks %q", err, w)
		}
	}
	for _, w := range not {
		if strings.Contains(err.Error(), w) {
			t.Errorf("%q has %q in it", err, w)
		}
	}
}

func TestValidateNamesFieldsOfTheAPI(t *testing.T) {
	err := storage.Config{Endpoint: "https://x.example", SecretAccessKey: "s"}.Validate()
	wantInvalid(t, nil, err, []string{"missing bucket and access_key_id"}, nil)
}

func TestConfigKeepsItsSecrets(t *testing.T) {
	c := storage.Config{
		Endpoint: "https://s3.example.com", Bucket: "bucket", AccessKeyID: "AKID", SecretAccessKey: "hunter2", Root: "team",
		EncryptionKey: []byte("hunter2-hunter2-hunter2-hunter2-"),
	}
	hexKey := fmt.Sprintf("%x", c.EncryptionKey)
	b64 := base64.StdEncoding.EncodeToString(c.EncryptionKey)
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "config", c, "pointer", &c, "err", fmt.Errorf("with %v", c))
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "config", c, "pointer", &c)
	for _, s := range []string{
		fmt.Sprint(c), fmt.Sprint(&c), fmt.Sprintf("%v %+v %#v %s %q", c, c, c, c, c), fmt.Sprintf("%+v %#v", &c, &c),
		fmt.Sprintf("%+v", struct{ C storage.Config }{c}), log.String(),
	} {
		for _, secret := range []string{"hunter2", hexKey, b64, "104 117 110"} {
			if strings.Contains(s, secret) {
				t.Errorf("%q has %q in it", s, secret)
			}
		}
		if !strings.Contains(s, "s3.example.com") {
			t.Errorf("%q does not say which object store it is", s)
		}
	}
	// What the server stores has them, and comes back whole.
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var back storage.Config
	if err := json.Unmarshal(data, &back); err != nil || back.SecretAccessKey != "hunter2" || back.Root != "team" || !bytes.Equal(back.EncryptionKey, c.EncryptionKey) {
		t.Errorf("%s came back as %#v, %v", data, back, err)
	}
	if got := c.URI("main"); got != "s3://bucket/team/main" {
		t.Errorf("URI: %s", got)
	}
}

func TestValidatePrefix(t *testing.T) {
	for _, p := range []string{"", "a", "main", "A/b.c/d_e-f", "0", "a..b", strings.Repeat("x", 200)} {
		if err := storage.ValidatePrefix(p); err != nil {
			t.Errorf("%q: %v", p, err)
		}
	}
	for _, p := range []string{
		"/", "/a", "a/", "a//b", ".", "..", "a/..", ".hidden", "a/.b", "_root", "-a", "a b", "a!b", "ä", "a\x00", "a\\b", "a:b",
		".cloudcode", "a/.cloudcode/v1", strings.Repeat("x", 201),
	} {
		if err := storage.ValidatePrefix(p); !errors.Is(err, storage.ErrInvalid) {
			t.Errorf("%q: %v", p, err)
		}
	}
}

func TestValidateRoot(t *testing.T) {
	for _, r := range []string{"", "a", "my folder/ä", "_x/-y/.z", "a:b"} {
		if err := storage.ValidateRoot(r); err != nil {
			t.Errorf("%q: %v", r, err)
		}
	}
	for _, r := range []string{"/", "a/", "/a", "a//b", ".", "a/..", "a\nb", "\xff", `a\b`, ".cloudcode/v1", strings.Repeat("x", 401)} {
		if err := storage.ValidateRoot(r); err == nil {
			t.Errorf("%q: no error", r)
		}
	}
}

var segment = rapid.StringMatching(`[A-Za-z0-9][A-Za-z0-9._-]{0,8}`)

var prefixes = rapid.Custom(func(t *rapid.T) string {
	return strings.Join(rapid.SliceOfN(segment, 0, 4).Draw(t, "segments"), "/")
})

func TestEscapePrefix(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := prefixes.Draw(t, "prefix")
		e := storage.EscapePrefix(p)
		if e == "" || strings.ContainsAny(e, "/") {
			t.Fatalf("%q is escaped to %q", p, e)
		}
		back, err := storage.UnescapePrefix(e)
		if err != nil || back != p {
			t.Fatalf("%q is escaped to %q, and back to %q, %v", p, e, back, err)
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		// Whatever it is: either it is what EscapePrefix makes, or an error.
		e := rapid.OneOf(rapid.String(), rapid.StringMatching(`[a-c!/._-]{0,6}`)).Draw(t, "escaped")
		p, err := storage.UnescapePrefix(e)
		if err == nil && (storage.EscapePrefix(p) != e || storage.ValidatePrefix(p) != nil) {
			t.Fatalf("%q became %q", e, p)
		}
	})
	for _, e := range []string{"", "a/b", "!", "a!", "!a", "a!!b", "_roots", ".x"} {
		if p, err := storage.UnescapePrefix(e); err == nil {
			t.Errorf("%q became %q", e, p)
		}
	}
}

// Overlap is what it means: some key can be in both folders.
func TestOverlap(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"", "", true},
		{"", "a", true},
		{"a", "a", true},
		{"a", "b", false},
		{"a", "ab", false},
		{"a", "a/b", true},
		{"a/b", "a/c", false},
		{"a/b", "a", true},
		{"a-b", "a", false},
	} {
		if storage.Overlap(c.a, c.b) != c.want || storage.Overlap(c.b, c.a) != c.want {
			t.Errorf("%q and %q: not %v", c.a, c.b, c.want)
		}
	}
	short := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab"}), 0, 3).Draw(t, "segments"), "/")
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := short.Draw(t, "a"), short.Draw(t, "b")
		in := func(key, folder string) bool {
			return strings.HasPrefix(key, storage.Join(folder, "")+"/") || folder == ""
		}
		// A key deep enough below either shows it.
		ka, kb := storage.Join(a, "key"), storage.Join(b, "key")
		if want := in(ka, b) || in(kb, a); storage.Overlap(a, b) != want {
			t.Fatalf("%q and %q: not %v", a, b, want)
		}
	})
}

func TestSameBucket(t *testing.T) {
	conf := func(endpoint, bucket, root string) storage.Config {
		return storage.Config{Endpoint: endpoint, Bucket: bucket, Root: root}
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"https://s3.example.com", "https://s3.example.com", true},
		{"https://s3.example.com", "https://S3.Example.com:443/", true},
		{"https://s3.example.com", "http://s3.example.com:80", true},
		{"https://s3.example.com", "https://s3.example.com:9000", false},
		{"https://s3.example.com", "https://s3.example.org", false},
		{"https://fly.storage.tigris.dev", "https://t3.storage.dev", true},
		{"https://s3.amazonaws.com", "https://s3.eu-west-1.amazonaws.com", true},
		{"http://127.0.0.1:9000", "http://localhost:9000", true},
		{"http://127.0.0.1:9000", "http://localhost:9001", false},
	} {
		a, b := conf(c.a, "bucket", ""), conf(c.b, "bucket", "")
		if storage.SameBucket(a, b) != c.want || storage.SameBucket(b, a) != c.want {
			t.Errorf("%s and %s: not %v", c.a, c.b, c.want)
		}
		b.Bucket = "another"
		if storage.SameBucket(a, b) {
			t.Errorf("%s and %s with another bucket are the same", c.a, c.b)
		}
	}
	a, b := conf("https://s3.example.com", "bucket", ""), conf("https://s3.example.com", "bucket", "team")
	for _, c := range []struct {
		a, b string
		want bool
	}{{"team/x", "x", true}, {"team", "x", true}, {"team/y", "x", false}, {"x", "x", false}, {"", "x", true}, {"team/x", "", true}, {"other", "", false}} {
		if got := storage.FoldersOverlap(a, c.a, b, c.b); got != c.want {
			t.Errorf("%q of the bucket and %q below team: %v", c.a, c.b, got)
		}
	}
}

func TestIsTigris(t *testing.T) {
	for e, want := range map[string]bool{
		"https://fly.storage.tigris.dev": true, "https://t3.storage.dev": true, "https://FLY.storage.Tigris.dev:443": true,
		"https://tigris.dev.example.com": false, "https://mystorage.dev": false, "https://s3.amazonaws.com": false, "": false,
	} {
		if storage.IsTigris(e) != want {
			t.Errorf("%s: not %v", e, want)
		}
	}
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestLoadProfiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "profiles.json")
	write(t, filepath.Join(dir, "team.secret"), "hunter2\n", 0o640)
	write(t, filepath.Join(dir, "team.key"), base64.StdEncoding.EncodeToString(make([]byte, 32))+"\n", 0o600)
	write(t, path, `{"profiles": {
	  "team": {"endpoint": "https://s3.example.com", "bucket": "team", "access_key_id": "AKID", "secret_access_key_file": "team.secret",
	    "encryption_key_file": "`+filepath.Join(dir, "team.key")+`", "prefix": "/agents/", "path_style": true, "region": "eu-1", "tigrisfs_args": "-x"}
	}}`, 0o644)
	got, err := storage.LoadProfiles(path)
	if err != nil {
		t.Fatal(err)
	}
	c := got["team"]
	if len(got) != 1 || c.SecretAccessKey != "hunter2" || len(c.EncryptionKey) != 32 || c.Root != "agents" || !c.PathStyle || c.Region != "eu-1" || c.TigrisFSArgs != "-x" {
		t.Errorf("got %+v", got)
	}

	env, err := storage.FromEnv(env(nil))
	if err != nil {
		t.Fatal(err)
	}
	p, err := storage.NewProfiles(env, got)
	if err != nil {
		t.Fatal(err)
	}
	if names := p.Names(); !slices.Equal(names, []string{"default", "team"}) {
		t.Errorf("names: %q", names)
	}
	for name, bucket := range map[string]string{"": "bucket", "default": "bucket", "team": "team"} {
		if c, ok := p.Get(name); !ok || c.Bucket != bucket {
			t.Errorf("%q is %v, %v", name, c, ok)
		}
	}
	if c, ok := p.Get("none"); ok {
		t.Errorf("none is %v", c)
	}
	if c, ok := p.Default(); !ok || c.Bucket != "bucket" {
		t.Errorf("default is %v, %v", c, ok)
	}
	if _, err := storage.NewProfiles(env, map[string]storage.Config{"default": c}); !errors.Is(err, storage.ErrInvalid) {
		t.Errorf("two defaults: %v", err)
	}
	var none *storage.Profiles
	if _, ok := none.Default(); ok || len(none.Names()) > 0 {
		t.Error("no profiles have one")
	}
}

func TestLoadProfilesSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "public"), "hunter2", 0o644)
	write(t, filepath.Join(dir, "empty"), "\n", 0o600)
	const base = `"endpoint": "https://s3.example.com", "bucket": "team", "access_key_id": "AKID"`
	for _, c := range []struct {
		name, content string
		mode          os.FileMode
		words         []string
	}{
		{"syntax", `{"profiles": `, 0o600, []string{"profiles.json"}},
		{"unknown field", `{"profiles": {"a": {` + base + `, "secret_key": "x"}}}`, 0o600, []string{"secret_key"}},
		{"unknown field above", `{"profile": {}}`, 0o600, []string{"profile"}},
		{"twice", `{"profiles": {}} {}`, 0o600, []string{"something follows"}},
		{"missing", `{"profiles": {"a": {` + base + `}}}`, 0o600, []string{"profile a", "missing secret_access_key"}},
		{"public", `{"profiles": {"a": {` + base + `, "secret_access_key": "hunter2"}}}`, 0o604, []string{"chmod o="}},
		{"public secret", `{"profiles": {"a": {` + base + `, "secret_access_key_file": "public"}}}`, 0o600, []string{"chmod o=", "public"}},
		{"empty secret", `{"profiles": {"a": {` + base + `, "secret_access_key_file": "empty"}}}`, 0o600, []string{"secret_access_key_file", "empty"}},
		{"no secret", `{"profiles": {"a": {` + base + `, "secret_access_key_file": "gone"}}}`, 0o600, []string{"secret_access_key_file", "gone"}},
		{"two secrets", `{"profiles": {"a": {` + base + `, "secret_access_key": "hunter2", "secret_access_key_file": "x"}}}`, 0o600, []string{"both secret_access_key and secret_access_key_file"}},
		{"name", `{"profiles": {"A b": {` + base + `, "secret_access_key": "hunter2"}}}`, 0o600, []string{"A b"}},
		{"key", `{"profiles": {"a": {` + base + `, "secret_access_key": "hunter2", "encryption_key": "aHVudGVyMg=="}}}`, 0o600, []string{"openssl rand"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, "profiles.json")
			write(t, path, c.content, c.mode)
			got, err := storage.LoadProfiles(path)
			wantInvalid(t, got, err, c.words, []string{"hunter2", "aHVudGVyMg"})
		})
	}
	if _, err := storage.LoadProfiles(filepath.Join(dir, "none.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func FuzzUnescapePrefix(f *testing.F) {
	f.Add("a!b")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := storage.UnescapePrefix(s); err == nil && storage.EscapePrefix(p) != s {
			t.Errorf("%q became %q", s, p)
		}
	})
}
