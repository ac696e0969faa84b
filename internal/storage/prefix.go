package storage

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxPrefix keeps an escaped prefix a file name, which it is where an S3 server
	// keeps objects in files.
	maxPrefix = 200
	maxRoot   = 400 // a key has 1024 bytes at most
	rootName  = "_root"
)

// ValidatePrefix checks a session's folder: segments of letters, digits, dots, hyphens and
// underscores that begin with a letter or digit, joined by slashes; or nothing, for all of the root.
func ValidatePrefix(p string) error {
	if p == "" {
		return nil
	}
	if len(p) > maxPrefix {
		return fmt.Errorf("%w: prefix has %d characters, more than %d", ErrInvalid, len(p), maxPrefix)
	}
	for seg := range strings.SplitSeq(p, "/") {
		for i, c := range []byte(seg) {
			alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
			if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
				return fmt.Errorf("%w: prefix %q: the parts between slashes must begin with a letter or digit, and have nothing but letters, digits, '.', '_' and '-'", ErrInvalid, p)
			}
		}
		if seg == "" {
			return fmt.Errorf("%w: prefix %q has a slash too many", ErrInvalid, p)
		}
	}
	return nil
}

// ValidateRoot checks what all sessions of a Config are below. It may have been
// there before Cloud Code, so that all but what breaks paths is allowed.
func ValidateRoot(r string) error {
	if r == "" {
		return nil
	}
	switch {
	case len(r) > maxRoot:
		return fmt.Errorf("it has %d bytes, more than %d", len(r), maxRoot)
	case !utf8.ValidString(r) || strings.ContainsFunc(r, unicode.IsControl) || strings.Contains(r, `\`):
		return fmt.Errorf("%q has a character that cannot be in a folder's name", r)
	}
	for seg := range strings.SplitSeq(r, "/") {
		switch seg {
		case "":
			return fmt.Errorf("%q must have no slash at its ends, nor two in a row", r)
		case ".", "..":
			return fmt.Errorf("%q must have no . or .. in it", r)
		case StateDir:
			return fmt.Errorf("%q: %s is where Cloud Code keeps its own", r, StateDir)
		}
	}
	return nil
}

// EscapePrefix makes a valid prefix one segment of a key.
func EscapePrefix(p string) string {
	if p == "" {
		return rootName
	}
	return strings.ReplaceAll(p, "/", "!")
}

// UnescapePrefix is the reverse of EscapePrefix. It returns ErrInvalid for what EscapePrefix
// makes of no valid prefix.
func UnescapePrefix(s string) (string, error) {
	if s == rootName {
		return "", nil
	}
	p := strings.ReplaceAll(s, "!", "/")
	if err := ValidatePrefix(p); err != nil {
		return "", err
	}
	if p == "" || EscapePrefix(p) != s {
		return "", fmt.Errorf("%w: %q is no escaped prefix", ErrInvalid, s)
	}
	return p, nil
}

// Join is the folder prefix below root; either may be empty.
func Join(root, prefix string) string {
	if root == "" || prefix == "" {
		return root + prefix
	}
	return root + "/" + prefix
}

// Folder is where in the bucket a session's files are.
func (c Config) Folder(prefix string) string { return Join(c.Root, prefix) }

// StateFolder is where in the bucket Cloud Code keeps its own.
func (c Config) StateFolder() string { return Join(c.Root, StateDir) }

// Overlap says whether two folders of one bucket are the same, or one is inside the
// other. The empty folder is the whole bucket.
func Overlap(a, b string) bool {
	return a == b || a == "" || b == "" || strings.HasPrefix(a, b+"/") || strings.HasPrefix(b, a+"/")
}

// SameBucket says whether two Configs are of the same bucket, as far as one can tell
// by the names: a store that answers at unrelated addresses is not recognised.
func SameBucket(a, b Config) bool {
	return a.Bucket == b.Bucket && storeName(a.Endpoint) == storeName(b.Endpoint)
}

// FoldersOverlap says whether two sessions would share files.
func FoldersOverlap(a Config, prefixA string, b Config, prefixB string) bool {
	return SameBucket(a, b) && Overlap(a.Folder(prefixA), b.Folder(prefixB))
}

// storeName is what addresses of the same object store have in common.
func storeName(endpoint string) string {
	if IsTigris(endpoint) {
		return "tigris" // one namespace of buckets behind all its addresses
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return endpoint
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	if host == "amazonaws.com" || strings.HasSuffix(host, ".amazonaws.com") {
		return "aws" // as above
	}
	if ip := net.ParseIP(host); host == "localhost" || ip != nil && ip.IsLoopback() {
		host = "localhost"
	}
	port := u.Port()
	if port == "" || u.Scheme == "https" && port == "443" || u.Scheme == "http" && port == "80" {
		// The same server may be asked with and without TLS.
		return host
	}
	return net.JoinHostPort(host, port)
}

// IsTigris says whether an endpoint is Tigris's, where mounts keep modes and links.
func IsTigris(endpoint string) bool {
	u, err := url.Parse(endpoint)
	return err == nil && hasDomain(u.Hostname(), "tigris.dev", "storage.dev")
}

func hasDomain(host string, domains ...string) bool {
	host = "." + strings.TrimSuffix(strings.ToLower(host), ".")
	for _, d := range domains {
		if strings.HasSuffix(host, "."+d) {
			return true
		}
	}
	return false
}
