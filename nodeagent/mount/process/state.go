package process

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
)

const stateFile = "state.json"

// state of one mount, in <Dir>/<id>/state.json. There are no secrets in it.
type state struct {
	ID    string    `json:"id"`
	Since time.Time `json:"since"`
	Boot  string    `json:"boot"`
	PID   int       `json:"pid"`
	Start uint64    `json:"start"` // of the process, as in /proc/PID/stat
	// Dev is the file system's number in mountinfo; "" until it is mounted.
	Dev   string `json:"dev,omitempty"`
	Point string `json:"point"`
	Log   string `json:"log"`
	Where where  `json:"where"`
	// Salt and Keys tell whether keys are the same, and nothing else about them.
	Salt string `json:"salt"`
	Keys string `json:"keys"`
}

// where is what of a Spec is no secret and makes one mount differ from another.
type where struct {
	Endpoint  string `json:"endpoint"`
	Bucket    string `json:"bucket"`
	Prefix    string `json:"prefix"`
	Region    string `json:"region"`
	PathStyle bool   `json:"path_style"`
	Args      string `json:"args"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	Cache     string `json:"cache,omitempty"`
}

func newState(s mount.Spec) (state, error) {
	boot, err := bootID()
	if err != nil {
		return state{}, err
	}
	salt := rand.Text()
	return state{
		ID: s.ID, Since: time.Now(), Boot: boot, Point: s.Point, Log: s.LogPath,
		Where: whereOf(s), Salt: salt, Keys: keysHash(salt, s),
	}, nil
}

func whereOf(s mount.Spec) where {
	return where{
		Endpoint: s.Endpoint, Bucket: s.Bucket, Prefix: s.Prefix, Region: s.Region,
		PathStyle: s.PathStyle, Args: s.Args, UID: s.UID, GID: s.GID, Cache: s.CacheDir,
	}
}

func keysHash(salt string, s mount.Spec) string {
	h := hmac.New(sha256.New, []byte(salt))
	_ = json.NewEncoder(h).Encode([]string{s.AccessKeyID, s.SecretAccessKey}) // a hash takes everything
	return hex.EncodeToString(h.Sum(nil))
}

// is says whether the mount is as s wants it.
func (st *state) is(s mount.Spec) bool {
	return st.Point == s.Point && st.Where == whereOf(s) && hmac.Equal([]byte(st.Keys), []byte(keysHash(st.Salt, s)))
}

// open returns the mounter's process, or errGone.
func (st *state) open() (*proc, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if boot != st.Boot {
		return nil, errGone
	}
	return openProc(st.PID, st.Start)
}

func (m *Mounter) folder(id string) string { return filepath.Join(m.cfg.Dir, id) }

// load returns mount.ErrNotFound if there is none.
func (m *Mounter) load(id string) (*state, error) {
	if !validID(id) {
		return nil, fmt.Errorf("%w: id %q", mount.ErrInvalid, id)
	}
	path := filepath.Join(m.folder(id), stateFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, mount.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	st := &state{}
	if err := json.Unmarshal(data, st); err != nil || st.ID != id || st.Point == "" {
		return nil, fmt.Errorf("%s is damaged; unmount by hand what it was for, and remove it: %w", path, errors.Join(err, mount.ErrFailed))
	}
	return st, nil
}

func (m *Mounter) save(st *state) error {
	data, err := json.MarshalIndent(st, "", "\t")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(m.folder(st.ID), stateFile), data, 0o600)
}

// forget removes the state, and what the mounter kept beside it.
func (m *Mounter) forget(id string) error {
	if st, err := m.load(id); err == nil {
		if err := removeCache(st.Where.Cache); err != nil {
			return err
		}
	}
	// Before the rest, which means nothing without it.
	if err := os.Remove(filepath.Join(m.folder(id), stateFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(m.folder(id))
}

func removeCache(dir string) error {
	if dir == "" {
		return nil
	}
	return mount.RemoveAll(dir)
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func validID(id string) bool { return idPattern.MatchString(id) }

// check returns ErrInvalid for a spec that must not reach a mounter's command line.
func check(s mount.Spec) error {
	bad := func(what, v string) error {
		return fmt.Errorf("%w: %s %q", mount.ErrInvalid, what, v)
	}
	switch {
	case s.PublicOnly:
		return fmt.Errorf("%w: buckets of sessions' own are not mounted, unless the server is started with --own-storage=any", mount.ErrInvalid)
	case s.CacheDir != "" && (!filepath.IsAbs(s.CacheDir) || filepath.Clean(s.CacheDir) != s.CacheDir || s.CacheDir == "/"):
		return bad("cache folder", s.CacheDir)
	case !validID(s.ID):
		return bad("id", s.ID)
	case !filepath.IsAbs(s.Point) || filepath.Clean(s.Point) != s.Point || s.Point == "/":
		return bad("folder", s.Point)
	case !filepath.IsAbs(s.LogPath):
		return bad("log file", s.LogPath)
	case !regexp.MustCompile(`^[a-z0-9A-Z][A-Za-z0-9._-]{1,254}$`).MatchString(s.Bucket):
		return bad("bucket", s.Bucket)
	case !strings.HasPrefix(s.Endpoint, "http://") && !strings.HasPrefix(s.Endpoint, "https://"):
		return bad("endpoint (it begins with https://)", s.Endpoint)
	case strings.HasPrefix(s.Prefix, "/") || strings.HasSuffix(s.Prefix, "/") || strings.HasPrefix(s.Prefix, "-"):
		return bad("prefix", s.Prefix)
	case strings.ContainsAny(s.Region, " \t") || strings.HasPrefix(s.Region, "-"):
		return bad("region", s.Region)
	case s.AccessKeyID == "" || s.SecretAccessKey == "":
		return fmt.Errorf("%w: no keys", mount.ErrInvalid)
	}
	for _, v := range []string{s.Point, s.LogPath, s.Endpoint, s.Prefix, s.Region, s.Args, s.AccessKeyID, s.SecretAccessKey} {
		if strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return fmt.Errorf("%w: a control character in the spec", mount.ErrInvalid)
		}
	}
	return nil
}
