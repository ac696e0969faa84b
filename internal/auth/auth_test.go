package auth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mustNew(t *testing.T, user, pass string) *Verifier {
	t.Helper()
	v, err := New(user, pass)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func basic(user, pass string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))
}

func TestKindsOfPassword(t *testing.T) {
	argon, err := HashPassword("s3cret:ü")
	if err != nil {
		t.Fatal(err)
	}
	bc, err := bcrypt.GenerateFromPassword([]byte("s3cret:ü"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	for name, stored := range map[string]string{
		"plain":    "s3cret:ü",
		"argon2id": argon,
		"bcrypt":   string(bc),
		"bcrypt2y": strings.Replace(string(bc), "$2a$", "$2y$", 1),
	} {
		t.Run(name, func(t *testing.T) {
			v := mustNew(t, "ann", stored)
			if !v.Enabled() {
				t.Fatal("not enabled")
			}
			for range 2 { // the second time from the cache
				for _, c := range []struct {
					header string
					want   bool
				}{
					{basic("ann", "s3cret:ü"), true},
					{strings.Replace(basic("ann", "s3cret:ü"), "Basic", "bASIC", 1), true},
					{strings.TrimRight(basic("ann", "s3cret:ü"), "="), true},
					{basic("Ann", "s3cret:ü"), false},
					{basic("ann", "s3cret:u"), false},
					{basic("ann", ""), false},
					{basic("", "s3cret:ü"), false},
					{basic("ann", stored) + "x", false},
					{"Basic", false},
					{"Basic !!!", false},
					{"Basic " + base64.StdEncoding.EncodeToString([]byte("ann")), false},
					{"Bearer s3cret:ü", false},
					{"", false},
					{basic("ann", strings.Repeat("x", 2*maxHeader)), false},
				} {
					if got := v.Header(c.header); got != c.want {
						t.Errorf("Header(%.60q) = %v, want %v", c.header, got, c.want)
					}
				}
			}
		})
	}
}

func TestHashIsNotAPassword(t *testing.T) {
	h, err := HashPassword("pw")
	if err != nil {
		t.Fatal(err)
	}
	if mustNew(t, "", h).Basic("", h) {
		t.Error("the hash itself is accepted as the password")
	}
}

func TestNoUserNameAcceptsAny(t *testing.T) {
	v := mustNew(t, "", "pw")
	for _, user := range []string{"", "opencode", "x"} {
		if !v.Basic(user, "pw") {
			t.Errorf("user %q with the right password is refused", user)
		}
		if v.Basic(user, "no") {
			t.Errorf("user %q with a wrong password is accepted", user)
		}
	}
}

func TestDisabledFailsClosed(t *testing.T) {
	v := mustNew(t, "ann", "")
	if v.Enabled() || (*Verifier)(nil).Enabled() {
		t.Error("enabled without a password")
	}
	if v.Basic("ann", "") || v.Header("") || v.Header("Bearer ") || (*Verifier)(nil).Header(basic("a", "b")) {
		t.Error("something is accepted although nothing is configured")
	}
}

func TestTokens(t *testing.T) {
	v := mustNew(t, "ann", "pw")
	v.AddToken("")
	v.AddToken("one")
	v.AddToken("two")
	for header, want := range map[string]bool{
		"Bearer one": true, "bearer two": true, "Bearer  two ": true,
		"Bearer": false, "Bearer ": false, "Bearer three": false, "Basic one": false, "one": false,
	} {
		if got := v.Header(header); got != want {
			t.Errorf("Header(%q) = %v, want %v", header, got, want)
		}
	}
}

func TestBadConfiguration(t *testing.T) {
	good, err := HashPassword("x")
	if err != nil {
		t.Fatal(err)
	}
	for _, pass := range []string{
		"$2a$10$short",
		"$2b$99$" + strings.Repeat("a", 53),
		"$2b$31$" + strings.Repeat("a", 53),
		"$2x$05$" + strings.Repeat("a", 53),
		"$argon2id$",
		"$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ",
		strings.Replace(good, "v=19", "v=16", 1),
		strings.Replace(good, "m=19456", "m=99999999", 1),
		strings.Replace(good, "m=19456", "m=1", 1),
		strings.Replace(good, "t=2", "t=0", 1),
		strings.Replace(good, "t=2,", "t=2 ,", 1),
		strings.Replace(good, "p=1", "p=300", 1),
		good + "!",
		"$6$salt$hash",
		"$argon2i$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA",
	} {
		if _, err := New("u", pass); err == nil {
			t.Errorf("New accepts %q", pass)
		}
	}
	if _, err := New("a:b", "x"); err == nil {
		t.Error("New accepts a user name with a colon")
	}
	for _, pass := range []string{"$2cool", "$money$", "$", "$argon2", "2a$10"} {
		if v, err := New("u", pass); err != nil || !v.Basic("u", pass) {
			t.Errorf("the plain password %q does not work: %v", pass, err)
		}
	}
	if _, err := HashPassword(""); err == nil {
		t.Error("an empty password is hashed")
	}
}

// gate is a hasher that counts, and waits to be released.
type gate struct {
	calls, now, most atomic.Int32
	entered          chan struct{}
	release          chan struct{}
}

func (g *gate) matches(pass string) bool {
	g.calls.Add(1)
	if n := g.now.Add(1); n > g.most.Load() {
		g.most.Store(n)
	}
	defer g.now.Add(-1)
	g.entered <- struct{}{}
	<-g.release
	return pass == "right"
}

func TestHashesAreBoundedAndCached(t *testing.T) {
	g := &gate{entered: make(chan struct{}, 1000), release: make(chan struct{}, 1000)}
	v := mustNew(t, "", "x")
	v.hash = g

	// Many at once with the right password: one hash.
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if !v.Basic("", "right") {
				t.Error("right password refused")
			}
		})
	}
	<-g.entered
	g.release <- struct{}{}
	wg.Wait()
	if n := g.calls.Load(); n != 1 {
		t.Fatalf("%d hashes for one password", n)
	}

	// A flood of wrong ones: one at a time, a bounded queue, and who is known
	// is still served at once.
	busy := make(chan error, 200)
	for i := range 200 {
		wg.Go(func() { busy <- v.CheckBasic("", fmt.Sprint("wrong", i)) })
	}
	<-g.entered
	for range 200 - cap(v.queue) {
		if err := <-busy; !errors.Is(err, ErrBusy) {
			t.Fatalf("got %v, want ErrBusy", err)
		}
	}
	if !v.Basic("", "right") {
		t.Error("a known password is refused during a flood")
	}
	close(g.release)
	wg.Wait()
	if n := g.most.Load(); n != 1 {
		t.Errorf("%d hashes at the same time", n)
	}
	if n := g.calls.Load(); n > 1+int32(cap(v.queue)) {
		t.Errorf("%d hashes", n)
	}
	if v.Basic("", "wrong") {
		t.Error("wrong password accepted")
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache(8)
	c.put(digest{1}, true)
	for i := range 1000 {
		c.put(digest{2, byte(i), byte(i >> 8)}, false)
	}
	if len(c.wrong) != 8 || len(c.right) != 1 {
		t.Errorf("%d wrong, %d right", len(c.wrong), len(c.right))
	}
	if ok, known := c.get(digest{1}); !ok || !known {
		t.Error("wrong guesses pushed out the right password")
	}
}

func FuzzHeader(f *testing.F) {
	v, err := New("ann", "pw")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(basic("ann", "pw"))
	f.Add("Bearer x")
	f.Fuzz(func(t *testing.T, h string) {
		if !v.Header(h) {
			return
		}
		_, rest, _ := strings.Cut(strings.TrimSpace(h), " ")
		if u, p, ok := DecodeBasic(strings.TrimSpace(rest)); !ok || u != "ann" || p != "pw" {
			t.Errorf("%q is accepted", h)
		}
	})
}
