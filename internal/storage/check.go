package storage

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

const (
	// checkTime bounds a Check: somebody waits for it.
	checkTime = 30 * time.Second
	probeDir  = StateDir + "/probe/"
)

// Check asks the object store whether a Config works: keys, bucket, region and
// address. With deep it also writes, and looks whether conditional writes are honoured,
// which keep two nodes from working on one session. What it returns has objstore's
// classes, or ErrInvalid, and words for the one who wrote the Config.
func Check(ctx context.Context, c Config, deep bool) error {
	s, err := Open(c)
	if err != nil {
		return err
	}
	defer objstore.Close(s) //nolint:errcheck // idle connections only
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	return check(ctx, s, deep)
}

func check(ctx context.Context, s objstore.Store, deep bool) (err error) {
	if err := first(ctx, s, probeDir); err != nil {
		return err
	}
	if !deep {
		return nil
	}
	// Unique, so that checks at the same time are no concern of one another.
	key := probeDir + strings.ToLower(rand.Text())
	defer func() {
		// Also after a failure and past the caller's time: the probe is ours to remove.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkTime)
		defer cancel()
		if e := s.Delete(ctx, key); e != nil && err == nil {
			err = fmt.Errorf("the object that was written to try it cannot be deleted: %w", e)
		}
	}()
	one, two, three := []byte("one "+key), []byte("two "+key), []byte("three "+key)
	created, err := s.Put(ctx, key, one, objstore.PutOptions{IfNoneMatch: true})
	if err != nil {
		return fmt.Errorf("an object cannot be created: %w", err)
	}
	if err := wantData(ctx, s, key, one); err != nil {
		return err
	}
	_, err = s.Put(ctx, key, two, objstore.PutOptions{IfNoneMatch: true})
	if err := honoured("If-None-Match", err); err != nil {
		return err
	}
	changed, err := s.Put(ctx, key, two, objstore.PutOptions{IfMatch: created.ETag})
	if err != nil {
		if errors.Is(err, objstore.ErrPrecondition) {
			return unconditional("If-Match")
		}
		return fmt.Errorf("an object cannot be changed: %w", err)
	}
	if changed.ETag == created.ETag {
		return unconditional("ETag")
	}
	// With the ETag that it had, as a node would that was overtaken.
	_, err = s.Put(ctx, key, three, objstore.PutOptions{IfMatch: created.ETag})
	if err := honoured("If-Match", err); err != nil {
		return err
	}
	return wantData(ctx, s, key, two)
}

func honoured(condition string, err error) error {
	switch {
	case err == nil:
		return unconditional(condition)
	case errors.Is(err, objstore.ErrPrecondition):
		return nil
	}
	return err
}

func unconditional(condition string) error {
	return fmt.Errorf("%w: it does not do conditional writes (%s), without which two nodes could write to one session: use a store that has them, as AWS S3, Tigris, R2, MinIO, Ceph and versitygw do in current versions",
		objstore.ErrUnsupported, condition)
}

func wantData(ctx context.Context, s objstore.Store, key string, want []byte) error {
	got, _, err := s.Get(ctx, key)
	switch {
	case errors.Is(err, objstore.ErrNotFound):
		return fmt.Errorf("%w: an object that was just written is not there: reads must see writes at once", objstore.ErrUnsupported)
	case err != nil:
		return fmt.Errorf("an object cannot be read: %w", err)
	case !bytes.Equal(got, want):
		return fmt.Errorf("%w: an object that was just written reads as something else: reads must see writes at once", objstore.ErrUnsupported)
	}
	return nil
}

// first asks for the first object with a prefix.
func first(ctx context.Context, s objstore.Store, prefix string) error {
	_, err := exists(ctx, s, prefix)
	return err
}

func exists(ctx context.Context, s objstore.Store, prefix string) (bool, error) {
	for _, err := range s.List(ctx, prefix, "", "") {
		return err == nil, err
	}
	return false, nil
}

// WrittenByOriginal says whether the folder of a session looks like one that the
// original project filled: it has a workspace, or OpenCode's data, as plain objects. The
// folder is relative to the store's.
func WrittenByOriginal(ctx context.Context, s objstore.Store, folder string) (bool, error) {
	for _, dir := range []string{"workspace/", ".opencode/"} {
		if found, err := exists(ctx, s, Join(folder, dir)); found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// IsRoot says whether a folder holds what Cloud Code keeps for the sessions of another
// root. Such a folder must not become a session's: it would see all of them.
func IsRoot(ctx context.Context, s objstore.Store, folder string) (bool, error) {
	return exists(ctx, s, Join(folder, StateDir+"/"))
}

// ResolveRegion returns the region for mounters, which cannot ask for it themselves.
func ResolveRegion(ctx context.Context, c Config) (string, error) {
	if err := c.Validate(); err != nil {
		return "", err
	}
	if c.Region != "" && c.Region != RegionAuto {
		return c.Region, nil
	}
	return objstore.Region(ctx, c.ObjStore())
}
