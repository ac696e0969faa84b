package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cache is a folder of one process at a time:
//
//	lock                     held (flock) while a build runs
//	layer-KEY.tar.zst        a layer, named by what went into it
//	layer-KEY.json           its digests and sizes; written last, so it vouches for the other
//	session-DIGEST-REF.tar   an archive
//	work-…                   of a running build; left-overs go when the next one starts
type cache struct {
	dir  string
	lock *os.File
}

// lockRetry is how often a waiting build looks whether the other is done.
const lockRetry = 200 * time.Millisecond

func openCache(ctx context.Context, dir string, waiting func()) (*cache, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(abs, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for first := true; ; first = false {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if first {
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("another build holds %s: %w", f.Name(), context.Cause(ctx)), f.Close())
		case <-time.After(lockRetry):
		}
	}
	c := &cache{dir: abs, lock: f}
	if err := c.removeMatching("work-*"); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// close lets the next build in; closing the file drops the lock.
func (c *cache) close() { _ = c.lock.Close() }

func (c *cache) removeMatching(pattern string, keep ...string) error {
	found, err := filepath.Glob(filepath.Join(c.dir, pattern))
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range found {
		if !slices.Contains(keep, p) {
			errs = append(errs, os.RemoveAll(p))
		}
	}
	return errors.Join(errs...)
}

func (c *cache) layerPath(key string) string { return filepath.Join(c.dir, "layer-"+key+".tar.zst") }

func (c *cache) metaPath(key string) string {
	return strings.TrimSuffix(c.layerPath(key), ".tar.zst") + ".json"
}

// layer returns what was built for key, or nil. A layer that does not have its size is none;
// importing checks the digest.
func (c *cache) layer(key string) *layer {
	data, err := os.ReadFile(c.metaPath(key))
	if err != nil {
		return nil
	}
	l := &layer{path: c.layerPath(key), cached: true}
	if json.Unmarshal(data, l) != nil || l.Key != key {
		return nil
	}
	if info, err := os.Stat(l.path); err != nil || info.Size() != l.LayerSize {
		return nil
	}
	return l
}

func (c *cache) store(l *layer) error {
	// Until the new figures are written there must be none: the old ones may vouch for other bytes.
	if err := os.Remove(c.metaPath(l.Key)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(l.path, c.layerPath(l.Key)); err != nil {
		return err
	}
	l.path = c.layerPath(l.Key)
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return os.WriteFile(c.metaPath(l.Key), data, 0o644)
}

// prune removes what the build that just ended does not use: old versions' layers and archives.
// A process that is importing such an archive keeps its open file.
func (c *cache) prune(layers []*layer, archive string) error {
	keep := []string{archive}
	for _, l := range layers {
		keep = append(keep, c.layerPath(l.Key), c.metaPath(l.Key))
	}
	if err := errors.Join(c.removeMatching("layer-*", keep...), c.removeMatching("session-*", keep...)); err != nil {
		return fmt.Errorf("clean the image cache: %w", err)
	}
	return nil
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := newCountingHash()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return h.digest().String(), nil
}
