package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// DefaultProfile is the name of what the environment configures, and of the profile
// that sessions get that name none.
const DefaultProfile = "default"

// profileName is what can be in a resource name and on a command line.
var profileName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// Profiles are the object stores that sessions can name. The zero value has none.
type Profiles struct {
	byName map[string]Config
}

// NewProfiles joins what the environment configures, nil for nothing, with the profiles of a file.
func NewProfiles(env *Config, file map[string]Config) (*Profiles, error) {
	p := &Profiles{byName: map[string]Config{}}
	for name, c := range file {
		if !profileName.MatchString(name) {
			return nil, fmt.Errorf("%w: profile name %q: lower-case letters, digits and hyphens, at most 40", ErrInvalid, name)
		}
		if err := c.Validate(); err != nil {
			return nil, fmt.Errorf("profile %s: %w", name, err)
		}
		p.byName[name] = c
	}
	if env != nil {
		if _, ok := p.byName[DefaultProfile]; ok {
			return nil, fmt.Errorf("%w: the profile %q is both in the file and in the environment (%s …): remove one",
				ErrInvalid, DefaultProfile, EnvEndpoint)
		}
		p.byName[DefaultProfile] = *env
	}
	return p, nil
}

// Get returns a profile by its name; the empty name is the default.
func (p *Profiles) Get(name string) (c Config, ok bool) {
	if name == "" {
		name = DefaultProfile
	}
	if p != nil {
		c, ok = p.byName[name]
	}
	return c, ok
}

// Default is the profile of sessions that name none. Without it they stay on their node's disk.
func (p *Profiles) Default() (Config, bool) { return p.Get(DefaultProfile) }

// Names are all names, sorted.
func (p *Profiles) Names() []string {
	if p == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(p.byName))
}

// profileFile is what LoadProfiles reads.
type profileFile struct {
	Profiles map[string]profile `json:"profiles"`
}

type profile struct {
	Endpoint            string `json:"endpoint"`
	Bucket              string `json:"bucket"`
	AccessKeyID         string `json:"access_key_id"`
	SecretAccessKey     string `json:"secret_access_key"`
	SecretAccessKeyFile string `json:"secret_access_key_file"`
	Region              string `json:"region"`
	PathStyle           bool   `json:"path_style"`
	Prefix              string `json:"prefix"`
	TigrisFSArgs        string `json:"tigrisfs_args"`
	EncryptionKey       string `json:"encryption_key"`
	EncryptionKeyFile   string `json:"encryption_key_file"`
}

// LoadProfiles reads storage profiles from a JSON file:
//
//	{"profiles": {"team": {
//	  "endpoint": "https://fly.storage.tigris.dev", "bucket": "b",
//	  "access_key_id": "…", "secret_access_key_file": "/etc/cloudcode/team.secret",
//	  "region": "auto", "path_style": false, "prefix": "", "tigrisfs_args": "",
//	  "encryption_key_file": "/etc/cloudcode/team.key"}}}
//
// Secrets stand in it (secret_access_key, encryption_key) or in files of their own,
// whose relative paths start at the profiles' folder. A file with a secret that
// every user of the machine can read is an error; a group may be let in.
func LoadProfiles(path string) (map[string]Config, error) {
	data, mode, err := readFile(path)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var f profileFile
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, path, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: %s: something follows behind the profiles", ErrInvalid, path)
	}
	all := map[string]Config{}
	for name, p := range f.Profiles {
		if (p.SecretAccessKey != "" || p.EncryptionKey != "") && public(mode) {
			return nil, publicError(path)
		}
		c, err := p.config(filepath.Dir(path))
		if err != nil {
			return nil, fmt.Errorf("%s: profile %s: %w", path, name, err)
		}
		all[name] = c
	}
	// Names and contents by the rules of them all.
	if _, err := NewProfiles(nil, all); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return all, nil
}

func (p profile) config(dir string) (Config, error) {
	secret, err := secretFrom(dir, "secret_access_key", p.SecretAccessKey, p.SecretAccessKeyFile)
	if err != nil {
		return Config{}, err
	}
	text, err := secretFrom(dir, "encryption_key", p.EncryptionKey, p.EncryptionKeyFile)
	if err != nil {
		return Config{}, err
	}
	key, err := ParseEncryptionKey(text)
	if err != nil {
		return Config{}, fmt.Errorf("%w: encryption_key: %w", ErrInvalid, err)
	}
	return Config{
		Endpoint: p.Endpoint, Bucket: p.Bucket, AccessKeyID: p.AccessKeyID, SecretAccessKey: secret,
		Region: p.Region, PathStyle: p.PathStyle, Root: strings.Trim(p.Prefix, "/"), TigrisFSArgs: p.TigrisFSArgs,
		EncryptionKey: key,
	}, nil
}

// secretFrom returns a secret that is given itself or by the name of its file.
func secretFrom(dir, field, value, file string) (string, error) {
	switch {
	case file == "":
		return value, nil
	case value != "":
		return "", fmt.Errorf("%w: both %s and %s_file: remove one", ErrInvalid, field, field)
	case !filepath.IsAbs(file):
		file = filepath.Join(dir, file)
	}
	data, mode, err := readFile(file)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s_file: %w", field, err)
	case public(mode):
		return "", publicError(file)
	}
	secret := strings.TrimSpace(string(data))
	if secret == "" {
		return "", fmt.Errorf("%w: %s_file: %s is empty", ErrInvalid, field, file)
	}
	return secret, nil
}

// readFile returns the mode of the very file that was read.
func readFile(path string) ([]byte, os.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	const enough = 1 << 20
	data, err := io.ReadAll(io.LimitReader(f, enough+1))
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if len(data) > enough {
		return nil, 0, fmt.Errorf("%w: %s is too large", ErrInvalid, path)
	}
	return data, fi.Mode(), nil
}

func public(mode os.FileMode) bool { return mode.Perm()&0o007 != 0 }

func publicError(path string) error {
	return fmt.Errorf("%w: %s has secrets in it, and everybody on this machine may read it: chmod o= %s", ErrInvalid, path, path)
}
