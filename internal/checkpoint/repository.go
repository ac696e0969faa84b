package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Repository is all checkpoints of one root. It is safe for concurrent use.
type Repository struct {
	store objstore.Store
	base  string // "<root>/.cloudcode/v1/"
	crypt *cryptor

	mu    sync.Mutex
	infos map[string]cachedInfo // by key: manifests never change
}

type cachedInfo struct {
	etag string
	info Info
}

// maxInfos and maxInfo, the size of one, bound what List remembers.
const (
	maxInfos = 4096
	maxInfo  = 256 << 10
)

var errPrefix = errors.New("a session's prefix is made of A-Z a-z 0-9 . _ - and /, each part beginning with a letter or digit")

// Open gives the repository below root, which has no slash at its ends and may be
// empty. key is nil or 32 bytes. It does no I/O.
func Open(s objstore.Store, root string, key []byte) (*Repository, error) {
	c, err := newCryptor(key)
	if err != nil {
		return nil, err
	}
	if root != "" {
		root += "/"
	}
	return &Repository{store: s, base: root + ".cloudcode/v1/", crypt: c, infos: map[string]cachedInfo{}}, nil
}

// Session of a prefix. Its methods fail if the prefix cannot be one.
type Session struct {
	r       *Repository
	prefix  string
	escaped string
	err     error
}

var prefixPart = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// Session gives access to one session's checkpoints. It does no I/O.
func (r *Repository) Session(prefix string) *Session {
	s := &Session{r: r, prefix: prefix}
	if prefix == "" {
		s.escaped = "_root"
		return s
	}
	for part := range strings.SplitSeq(prefix, "/") {
		if !prefixPart.MatchString(part) {
			s.err = fmt.Errorf("%q: %w", prefix, errPrefix)
		}
	}
	s.escaped = strings.ReplaceAll(prefix, "/", "!")
	return s
}

func unescape(escaped string) string {
	if escaped == "_root" {
		return ""
	}
	return strings.ReplaceAll(escaped, "!", "/")
}

func (s *Session) dir() string          { return s.r.base + "sessions/" + s.escaped + "/" }
func (s *Session) headKey() string      { return s.dir() + "head" }
func (s *Session) manifests() string    { return s.dir() + "manifests/" }
func (s *Session) key(id string) string { return s.manifests() + id }
func (r *Repository) packs() string     { return r.base + "packs/" }
func (r *Repository) pack(id packID) string {
	n := id.String()
	return r.packs() + n[:2] + "/" + n
}

// Prefix of the session.
func (s *Session) Prefix() string { return s.prefix }

// Stored is a session as the bucket has it.
type Stored struct {
	Prefix   string
	Head     Head
	Manifest *Manifest // of the head; nil without a checkpoint
	Err      error     // head or manifest cannot be read
}

// Sessions yields all sessions of the root, by prefix. One that is damaged is
// yielded with its Err; an error beside it ends the listing.
func (r *Repository) Sessions(ctx context.Context) iter.Seq2[Stored, error] {
	return r.sessions(ctx, "", nil)
}

// Around yields, as Sessions does, those whose folder is inside that of a prefix or
// around it, without that one itself.
func (r *Repository) Around(ctx context.Context, prefix string) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		within, around := "", []string(nil)
		if prefix != "" {
			within, around = strings.ReplaceAll(prefix, "/", "!")+"!", []string{""}
			for i, c := range prefix {
				if c == '/' {
					around = append(around, prefix[:i])
				}
			}
		}
		for st, err := range r.sessions(ctx, within, around) {
			if err == nil && st.Prefix == prefix {
				continue
			}
			if !yield(st, err) {
				return
			}
		}
	}
}

// sessions yields those with these prefixes, and those whose escaped prefix begins with
// within.
func (r *Repository) sessions(ctx context.Context, within string, all []string) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		all := slices.Clone(all) // once more, perhaps
		dir := r.base + "sessions/"
		for o, err := range r.store.List(ctx, dir+within, "/", "") {
			if err != nil {
				yield(Stored{}, fmt.Errorf("list sessions: %w", err))
				return
			}
			if name, ok := strings.CutSuffix(strings.TrimPrefix(o.Key, dir), "/"); ok && o.Prefix {
				all = append(all, unescape(name))
			}
		}
		// Some at a time, so that a bucket of many sessions costs few round trips.
		const window = 16
		for len(all) > 0 {
			n := min(window, len(all))
			found := make([]Stored, n)
			var g sync.WaitGroup
			for i, prefix := range all[:n] {
				g.Go(func() { found[i] = r.stored(ctx, prefix) })
			}
			g.Wait()
			all = all[n:]
			for _, st := range found {
				if errors.Is(st.Err, ErrNotFound) && st.Head.Manifest == "" || st.Head.Purged() {
					continue // manifests of it may be left
				}
				if ctx.Err() != nil {
					yield(Stored{}, ctx.Err())
					return
				}
				if errors.Is(st.Err, objstore.ErrUnavailable) || errors.Is(st.Err, objstore.ErrDenied) {
					yield(Stored{}, st.Err)
					return
				}
				if !yield(st, nil) {
					return
				}
			}
		}
	}
}

func (r *Repository) stored(ctx context.Context, prefix string) Stored {
	st := Stored{Prefix: prefix}
	s := r.Session(prefix)
	if st.Head, st.Err = s.Head(ctx); st.Err == nil && st.Head.Manifest != "" {
		st.Manifest, st.Err = s.Manifest(ctx, st.Head.Manifest)
	}
	return st
}
