// Package auth checks the credentials of users at our front doors: a user name
// with a password, or bearer tokens.
package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// maxHeader bounds what Header looks at, in bytes.
const maxHeader = 8 << 10

// ErrBusy says that so many unknown passwords wait to be hashed that one more
// is not even looked at. The caller may try again.
var ErrBusy = errors.New("too many sign-ins are being checked at the same time")

// ErrDenied says that credentials are missing or wrong.
var ErrDenied = errors.New("credentials are missing or wrong")

// Verifier checks credentials. It is safe for concurrent use; a nil Verifier
// is one that is not enabled.
type Verifier struct {
	key      []byte // random per process: what is kept in memory is of no use elsewhere
	anyUser  bool
	username digest
	password digest // when given in plain text
	hash     hasher // when given as a hash
	enabled  bool

	cache  *cache        // results of hash
	slots  chan struct{} // who may compute a hash
	queue  chan struct{} // who may wait for a slot
	mu     sync.RWMutex
	tokens []digest
}

type digest [sha256.Size]byte

// New returns a Verifier for one user.
//
// password is plain text, a bcrypt hash ("$2…") or an argon2id hash in PHC form
// ("$argon2id$…", see HashPassword). If it is empty, checking is off. If
// username is empty, any user name goes with the right password.
//
// It returns an error for a hash that cannot be parsed or is too expensive to
// be checked.
func New(username, password string) (*Verifier, error) {
	if strings.Contains(username, ":") {
		return nil, errors.New("auth: the user name must not contain a colon: Basic credentials cannot carry it")
	}
	v := &Verifier{
		key:     make([]byte, 32),
		anyUser: username == "",
		enabled: password != "",
		cache:   newCache(256),
		// One at a time: argon2 takes all the threads and memory it was made
		// with, and there must be CPU left for those who are signed in.
		slots: make(chan struct{}, 1),
		queue: make(chan struct{}, 32),
	}
	_, _ = rand.Read(v.key) // never fails (crypto/rand)
	h, err := parseHash(password)
	if err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	v.username = v.digest(username)
	v.hash = h
	if h == nil {
		v.password = v.digest(password)
	}
	return v, nil
}

// Enabled reports whether a password is set. When it is not, nothing should be
// asked of users; Basic and Header then accept nothing but tokens.
func (v *Verifier) Enabled() bool { return v != nil && v.enabled }

// AddToken makes token acceptable as a bearer token. An empty token is ignored.
func (v *Verifier) AddToken(token string) {
	if token == "" {
		return
	}
	d := v.digest(token)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tokens = append(v.tokens, d)
}

// Basic reports whether user and pass are right.
func (v *Verifier) Basic(user, pass string) bool { return v.CheckBasic(user, pass) == nil }

// Header reports whether the value of an Authorization header, Basic or
// Bearer, is right.
func (v *Verifier) Header(authorization string) bool { return v.CheckHeader(authorization) == nil }

// CheckBasic returns nil if user and pass are right, ErrDenied if they are
// not, and ErrBusy if that cannot be found out now.
func (v *Verifier) CheckBasic(user, pass string) error {
	if !v.Enabled() || len(user)+len(pass) > maxHeader {
		return ErrDenied
	}
	du := v.digest(user)
	userOK := subtle.ConstantTimeCompare(du[:], v.username[:]) == 1 || v.anyUser
	var passOK bool
	if v.hash == nil {
		dp := v.digest(pass)
		passOK = subtle.ConstantTimeCompare(dp[:], v.password[:]) == 1
	} else {
		// Also for a wrong user: how long it takes must not tell user names.
		var err error
		if passOK, err = v.checkHash(pass); err != nil {
			return err
		}
	}
	if userOK && passOK {
		return nil
	}
	return ErrDenied
}

// CheckHeader is CheckBasic for the value of an Authorization header, which
// may also hold a bearer token.
func (v *Verifier) CheckHeader(authorization string) error {
	if v == nil || len(authorization) > maxHeader {
		return ErrDenied
	}
	scheme, rest, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	rest = strings.TrimSpace(rest)
	switch {
	case strings.EqualFold(scheme, "Basic"):
		user, pass, ok := DecodeBasic(rest)
		if !ok {
			return ErrDenied
		}
		return v.CheckBasic(user, pass)
	case strings.EqualFold(scheme, "Bearer") && v.token(rest):
		return nil
	}
	return ErrDenied
}

// DecodeBasic takes user and password out of base64("user:password"), in the
// standard or the URL alphabet, padded or not.
func DecodeBasic(s string) (user, pass string, ok bool) {
	s = strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(s, "="))
	b, err := base64.RawStdEncoding.DecodeString(s)
	if err != nil {
		return "", "", false
	}
	return strings.Cut(string(b), ":")
}

func (v *Verifier) token(token string) bool {
	d := v.digest(token)
	v.mu.RLock()
	defer v.mu.RUnlock()
	found := 0
	for i := range v.tokens {
		found |= subtle.ConstantTimeCompare(d[:], v.tokens[i][:])
	}
	return found == 1
}

func (v *Verifier) checkHash(pass string) (bool, error) {
	d := v.digest(pass)
	if ok, known := v.cache.get(d); known {
		return ok, nil
	}
	select {
	case v.queue <- struct{}{}:
		defer func() { <-v.queue }()
	default:
		return false, ErrBusy
	}
	v.slots <- struct{}{}
	defer func() { <-v.slots }()
	// A page's requests come together: the first has computed it for all.
	if ok, known := v.cache.get(d); known {
		return ok, nil
	}
	ok := v.hash.matches(pass)
	v.cache.put(d, ok)
	return ok, nil
}

func (v *Verifier) digest(s string) digest {
	m := hmac.New(sha256.New, v.key)
	_ = binary.Write(m, binary.BigEndian, uint64(len(s)))
	m.Write([]byte(s))
	return digest(m.Sum(nil))
}

// cache remembers results, right and wrong ones apart, so that guesses cannot
// push out who is signed in.
type cache struct {
	mu    sync.Mutex
	limit int
	right map[digest]struct{}
	wrong map[digest]struct{}
}

func newCache(limit int) *cache {
	return &cache{limit: limit, right: map[digest]struct{}{}, wrong: map[digest]struct{}{}}
}

func (c *cache) get(d digest) (ok, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known = c.right[d]; known {
		return true, true
	}
	_, known = c.wrong[d]
	return false, known
}

func (c *cache) put(d digest, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.wrong
	if ok {
		m = c.right
	}
	if len(m) >= c.limit {
		for old := range m { // map order is random: no guess can choose what goes
			delete(m, old)
			break
		}
	}
	m[d] = struct{}{}
}
