package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
)

// What HashPassword uses: OWASP's first choice for argon2id.
const (
	argonMemory  = 19 * 1024 // KiB
	argonTime    = 2
	argonThreads = 1
	argonSalt    = 16
	argonKey     = 32
)

// What a hash may cost: more than this is a mistake, and a way to stop the
// process by asking for a page.
const (
	maxArgonMemory = 512 * 1024 // KiB
	maxArgonTime   = 64
	maxBcryptCost  = 15 // about 2 s
)

type hasher interface {
	matches(password string) bool
}

var (
	bcryptLike = regexp.MustCompile(`^\$2[a-z]?\$`)
	bcryptForm = regexp.MustCompile(`^\$2[aby]?\$[0-9]{2}\$[./A-Za-z0-9]{53}$`)
	otherHash  = regexp.MustCompile(`^\$(1|5|6|7|y|gy|md5|sha1|scrypt|argon2i|argon2d|pbkdf2[a-z0-9-]*)\$.+\$`)
)

// HashPassword returns the argon2id hash of password in PHC form, as New takes it.
func HashPassword(password string) (string, error) {
	if password == "" {
		return "", errors.New("auth: an empty password cannot be hashed")
	}
	salt := make([]byte, argonSalt)
	_, _ = rand.Read(salt) // never fails (crypto/rand)
	key := argon2.IDKey([]byte(password), salt, argonTime, argonMemory, argonThreads, argonKey)
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version,
		argonMemory, argonTime, argonThreads, b64.EncodeToString(salt), b64.EncodeToString(key)), nil
}

// parseHash returns nil for a password that is no hash.
func parseHash(s string) (hasher, error) {
	switch {
	case bcryptLike.MatchString(s):
		cost, err := bcrypt.Cost([]byte(s))
		if err != nil || !bcryptForm.MatchString(s) {
			return nil, errors.New("the password looks like a bcrypt hash but is none (in a shell, put it in single quotes: $ is special)")
		}
		if cost > maxBcryptCost {
			return nil, fmt.Errorf("the bcrypt hash has cost %d: at most %d, or signing in takes too long", cost, maxBcryptCost)
		}
		return bcryptHash(s), nil
	case strings.HasPrefix(s, "$argon2id$"):
		return parseArgon(s)
	case otherHash.MatchString(s):
		return nil, errors.New("the password looks like a hash of a kind that is not supported: use bcrypt or argon2id")
	}
	return nil, nil
}

type bcryptHash string

func (h bcryptHash) matches(password string) bool {
	return bcrypt.CompareHashAndPassword([]byte(h), []byte(password)) == nil
}

type argonHash struct {
	memory, time uint32
	threads      uint8
	salt, key    []byte
}

func (h argonHash) matches(password string) bool {
	key := argon2.IDKey([]byte(password), h.salt, h.time, h.memory, h.threads, uint32(len(h.key)))
	return subtle.ConstantTimeCompare(key, h.key) == 1
}

func parseArgon(s string) (hasher, error) {
	bad := func(what string) (hasher, error) {
		return nil, fmt.Errorf("the password looks like an argon2id hash but %s (in a shell, put it in single quotes: $ is special)", what)
	}
	// "", "argon2id", "v=19", "m=19456,t=2,p=1", salt, key
	parts := strings.Split(s, "$")
	if len(parts) != 6 {
		return bad("does not have five parts")
	}
	if parts[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return bad(fmt.Sprintf("its version is not v=%d", argon2.Version))
	}
	var h argonHash
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &h.memory, &h.time, &h.threads); err != nil ||
		parts[3] != fmt.Sprintf("m=%d,t=%d,p=%d", h.memory, h.time, h.threads) {
		return bad("its parameters are not m=…,t=…,p=…")
	}
	var err error
	if h.salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil || len(h.salt) < 8 || len(h.salt) > 64 {
		return bad("its salt is not 8 to 64 bytes of unpadded base64")
	}
	if h.key, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil || len(h.key) < 16 || len(h.key) > 64 {
		return bad("its key is not 16 to 64 bytes of unpadded base64")
	}
	if h.time < 1 || h.threads < 1 || h.memory < 8*uint32(h.threads) {
		return bad("its parameters are too small")
	}
	if h.time > maxArgonTime || h.memory > maxArgonMemory {
		return nil, fmt.Errorf("the argon2id hash needs m=%d,t=%d: at most m=%d,t=%d, or signing in takes too much", h.memory, h.time, maxArgonMemory, maxArgonTime)
	}
	return h, nil
}
